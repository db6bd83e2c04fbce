-- Runs before the new code. Nodes beyond the local one: who they are, who invited them, and what each gets of a request.

-- A request may be done by several nodes, so that several may be paid for it: once each.
DROP INDEX transfers_once_a_hold;
CREATE UNIQUE INDEX transfers_once_a_hold ON transfers (hold_id, kind, target_id) WHERE hold_id IS NOT NULL;

-- So that a hold still has one charge.
CREATE TRIGGER transfers_charge_to_revenue BEFORE INSERT ON transfers
WHEN NEW.kind = 'charge' AND NEW.target_id <> 'revenue'
BEGIN SELECT RAISE(ABORT, 'a charge goes to revenue'); END;

-- Nodes that asked to join, and servers of other makes. What a node says of itself is in `offers` (JSON) as it was last
-- signed; `sealed` is the session key, or a server's bearer token, encrypted under the key secret.
CREATE TABLE nodes (
    node_id TEXT PRIMARY KEY,
    small_id INTEGER NOT NULL UNIQUE,
    kind TEXT NOT NULL CHECK (kind IN ('own', 'upstream')),
    standing TEXT NOT NULL CHECK (standing IN ('pending', 'admitted', 'removed')),
    public_key BLOB UNIQUE CHECK (public_key IS NULL OR length(public_key) = 32),
    address TEXT NOT NULL,
    ip TEXT NOT NULL,
    certificate BLOB NOT NULL,
    country TEXT NOT NULL,
    offers TEXT NOT NULL,
    inputs_max INTEGER NOT NULL CHECK (inputs_max > 0),
    in_flight_max INTEGER NOT NULL CHECK (in_flight_max > 0),
    sealed BLOB NOT NULL,
    trusted INTEGER NOT NULL DEFAULT 0,
    weight REAL NOT NULL DEFAULT 1.0 CHECK (weight >= 0),
    draining INTEGER NOT NULL DEFAULT 0,
    quarantined TEXT NOT NULL DEFAULT '',
    receipts_count INTEGER NOT NULL DEFAULT 0,
    receipts_head BLOB NOT NULL CHECK (length(receipts_head) = 32),
    created_ms INTEGER NOT NULL,
    registered_ms INTEGER NOT NULL,
    CHECK ((kind = 'own') = (public_key IS NOT NULL))
) STRICT, WITHOUT ROWID;

CREATE TRIGGER nodes_stay BEFORE DELETE ON nodes WHEN OLD.standing <> 'pending'
BEGIN SELECT RAISE(ABORT, 'nodes that were admitted are kept, for their receipts and payables'); END;

-- Join tokens. `sealed` is the hash of the token's secret, encrypted under the key secret: whoever has it could join.
CREATE TABLE invites (
    invite_id TEXT PRIMARY KEY,
    sealed BLOB NOT NULL,
    note TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    used_ms INTEGER,
    node_id TEXT,
    CHECK ((used_ms IS NULL) = (node_id IS NULL))
) STRICT, WITHOUT ROWID;
