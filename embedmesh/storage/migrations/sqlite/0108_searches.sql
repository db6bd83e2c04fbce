-- Runs before the new code. Adds prices of searches: `searches` is in nano-USD for one, of rerankers that are paid so.
-- See `0104_generation.sql` for what the other meters are, and why a CHECK is changed in this way.

PRAGMA writable_schema = ON;

UPDATE sqlite_schema SET sql = replace(
    sql, 'meter IN (''input'', ''cached'', ''output'')', 'meter IN (''input'', ''cached'', ''output'', ''searches'')'
) WHERE type = 'table' AND name = 'prices';

PRAGMA writable_schema = RESET;
