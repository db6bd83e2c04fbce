-- Runs before the new code. Adds locks: holds that are placed before the request that uses them, at any gateway.
-- See `0100_start.sql` for units, and for what each of the older tables is.

-- -- locks: money set aside for one confidential request to one node under one of its keys, until `expires_ms`. The money
-- is the hold's, whose deadline is the expiry; the claim of that hold says which request has used the lock. `node_key` is
-- the node's key, `identity` that of the node that has signed it. `used_by` is an id of that use

CREATE TABLE locks (
    lock_id INTEGER PRIMARY KEY,
    hold_id TEXT NOT NULL UNIQUE REFERENCES holds,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    identity BLOB NOT NULL CHECK (length(identity) = 32),
    node_key BLOB NOT NULL CHECK (length(node_key) = 32),
    scheme TEXT NOT NULL,
    model TEXT NOT NULL,
    units INTEGER NOT NULL CHECK (units BETWEEN 1 AND 1000000000),
    price INTEGER NOT NULL CHECK (price BETWEEN 0 AND 1000000000000000),
    expires_ms INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    used_ms INTEGER CHECK (used_ms < expires_ms),
    used_by TEXT,
    CHECK ((used_ms IS NULL) = (used_by IS NULL))
) STRICT;
-- With all that is counted, so that no row is looked at.
CREATE INDEX locks_unused_of_account ON locks (account_id, expires_ms, key_id, used_ms) WHERE used_ms IS NULL;
CREATE INDEX locks_unused ON locks (expires_ms) WHERE used_ms IS NULL;

-- The price is split, so that the product fits 64 bits.
CREATE TRIGGER locks_have_holds BEFORE INSERT ON locks WHEN NEW.used_ms IS NOT NULL OR NOT EXISTS (
    SELECT 1 FROM holds
    WHERE hold_id = NEW.hold_id AND account_id = NEW.account_id AND key_id = NEW.key_id
        AND state = 'open' AND deadline_ms = NEW.expires_ms
        AND amount >= NEW.units * (NEW.price / 1000000) + (NEW.units * (NEW.price % 1000000) + 999999) / 1000000
)
BEGIN SELECT RAISE(ABORT, 'a lock is opened with an open hold, which covers it until it expires'); END;

CREATE TRIGGER locks_keep_their_terms
BEFORE UPDATE OF lock_id, hold_id, account_id, key_id, node_id, identity, node_key, scheme, model, units, price, expires_ms,
    created_ms ON locks
BEGIN SELECT RAISE(ABORT, 'a lock keeps its terms'); END;

CREATE TRIGGER locks_are_used_once BEFORE UPDATE OF used_ms, used_by ON locks
WHEN OLD.used_ms IS NOT NULL OR NOT EXISTS (SELECT 1 FROM holds WHERE hold_id = OLD.hold_id AND state = 'open')
BEGIN SELECT RAISE(ABORT, 'a lock is used once, while its hold is open'); END;

CREATE TRIGGER locks_stay_with_open_holds BEFORE DELETE ON locks
WHEN EXISTS (SELECT 1 FROM holds WHERE hold_id = OLD.hold_id AND state = 'open')
BEGIN SELECT RAISE(ABORT, 'a lock is kept until its hold has ended'); END;

-- -- holds: that of a lock gets another owner and deadline, once: from then on it is the hold of a request

DROP TRIGGER holds_keep_their_terms;

CREATE TRIGGER holds_keep_their_terms BEFORE UPDATE OF hold_id, account_id, key_id, amount, created_ms ON holds
BEGIN SELECT RAISE(ABORT, 'a hold keeps its terms'); END;

CREATE TRIGGER holds_change_hands_by_a_lock BEFORE UPDATE OF owner, deadline_ms ON holds WHEN NOT EXISTS (
    SELECT 1 FROM locks WHERE hold_id = OLD.hold_id AND used_ms IS NOT NULL AND expires_ms = OLD.deadline_ms
)
BEGIN SELECT RAISE(ABORT, 'a hold keeps its terms, unless its lock is used'); END;
