"""What is true anywhere: plain values and decisions. Standard library and msgspec only; nothing here awaits."""
