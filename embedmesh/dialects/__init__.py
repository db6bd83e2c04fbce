"""Forms of request and reply, one package each: parse, render, failure envelope. A dialect knows the rules only."""
