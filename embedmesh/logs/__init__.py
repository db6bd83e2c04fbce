"""Log lines of all programs that keep running: their form, their way to standard error, the access log."""
