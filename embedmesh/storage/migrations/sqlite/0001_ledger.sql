-- Runs before the new code. Makes the whole store.
-- Amounts are nano-USD; times (`_ms`) are Unix milliseconds; days are days since 1970-01-01 UTC.
-- Whatever the ledger promises is refused here if broken, so that no code, ours or a shell's, can break it by accident.

-- Facts about this store itself.
CREATE TABLE facts (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Where money can be. `balance` is the sum of the account's entries and `held` the sum of its open holds; only the
-- triggers below move them. A customer can never have less than is held.
CREATE TABLE accounts (
    account_id TEXT PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('customer', 'revenue', 'credit_source', 'node')),
    balance INTEGER NOT NULL DEFAULT 0,
    held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0),
    created_ms INTEGER NOT NULL,
    CHECK (kind <> 'customer' OR balance >= held)
) STRICT, WITHOUT ROWID;

INSERT INTO accounts (account_id, kind, created_ms) VALUES ('revenue', 'revenue', 0), ('credit_source', 'credit_source', 0);

CREATE TRIGGER accounts_start_empty BEFORE INSERT ON accounts WHEN NEW.balance <> 0 OR NEW.held <> 0
BEGIN SELECT RAISE(ABORT, 'an account starts empty'); END;

CREATE TRIGGER accounts_keep_their_kind BEFORE UPDATE OF account_id, kind ON accounts
BEGIN SELECT RAISE(ABORT, 'an account keeps its id and kind'); END;

CREATE TRIGGER accounts_stay BEFORE DELETE ON accounts
BEGIN SELECT RAISE(ABORT, 'accounts are never deleted'); END;

-- Bearer keys. Only a keyed hash is stored; `scopes` are words separated by spaces.
CREATE TABLE keys (
    key_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    name TEXT NOT NULL,
    token_hash BLOB NOT NULL UNIQUE CHECK (length(token_hash) = 32),
    scopes TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER,
    revoked_ms INTEGER
) STRICT, WITHOUT ROWID;

-- Money set aside, one row a request. `owner` is the gateway that placed it. The moves are those of rules.holds.MOVES.
CREATE TABLE holds (
    hold_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 4611686018427387904),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'captured', 'released')),
    ended_by TEXT,
    captured INTEGER CHECK (captured BETWEEN 0 AND amount),
    owner TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    deadline_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    CHECK ((state = 'open') = (ended_by IS NULL)),
    CHECK ((state = 'open') = (ended_ms IS NULL)),
    CHECK ((state = 'captured') = (captured IS NOT NULL)),
    CHECK ((state = 'captured') = (ended_by IS 'capture')),
    CHECK (ended_by IS NULL OR ended_by IN ('capture', 'release', 'expire', 'recover'))
) STRICT, WITHOUT ROWID;

CREATE INDEX holds_open ON holds (deadline_ms) WHERE state = 'open';

CREATE TRIGGER holds_start_open BEFORE INSERT ON holds WHEN NEW.state <> 'open'
BEGIN SELECT RAISE(ABORT, 'a hold starts open'); END;

CREATE TRIGGER holds_end_once BEFORE UPDATE ON holds WHEN OLD.state <> 'open'
BEGIN SELECT RAISE(ABORT, 'a hold ends once'); END;

CREATE TRIGGER holds_keep_their_terms BEFORE UPDATE OF hold_id, account_id, amount, owner, created_ms, deadline_ms ON holds
BEGIN SELECT RAISE(ABORT, 'a hold keeps its terms'); END;

CREATE TRIGGER holds_stay BEFORE DELETE ON holds
BEGIN SELECT RAISE(ABORT, 'holds are never deleted'); END;

CREATE TRIGGER holds_set_aside AFTER INSERT ON holds
BEGIN UPDATE accounts SET held = held + NEW.amount WHERE account_id = NEW.account_id; END;

CREATE TRIGGER holds_give_back AFTER UPDATE OF state ON holds WHEN NEW.state <> 'open'
BEGIN UPDATE accounts SET held = held - OLD.amount WHERE account_id = OLD.account_id; END;

-- Money moved from one account to another, in order. Append-only; corrections are new rows.
-- `reference` is an outside name (a payment's) that applies once.
CREATE TABLE transfers (
    transfer_id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('credit', 'charge', 'payable')),
    source_id TEXT NOT NULL REFERENCES accounts,
    target_id TEXT NOT NULL REFERENCES accounts,
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 4611686018427387904),
    hold_id TEXT REFERENCES holds,
    reference TEXT UNIQUE,
    created_ms INTEGER NOT NULL,
    CHECK (source_id <> target_id),
    CHECK ((kind = 'credit') = (hold_id IS NULL)),
    CHECK ((kind = 'credit') = (reference IS NOT NULL))
) STRICT;

CREATE UNIQUE INDEX transfers_once_a_hold ON transfers (hold_id, kind) WHERE hold_id IS NOT NULL;

-- The two sides of each transfer: minus at its source, plus at its target. Written by the trigger on transfers only.
-- That the transfer exists is minded by entries_follow_transfers: a foreign key would want an index of its own.
CREATE TABLE entries (
    account_id TEXT NOT NULL REFERENCES accounts,
    transfer_id INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    PRIMARY KEY (account_id, transfer_id)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER transfers_charge_what_was_captured BEFORE INSERT ON transfers WHEN NEW.kind = 'charge' AND NOT EXISTS (
    SELECT 1 FROM holds WHERE hold_id = NEW.hold_id AND account_id = NEW.source_id AND captured = NEW.amount
)
BEGIN SELECT RAISE(ABORT, 'a charge is what its hold captured'); END;

CREATE TRIGGER transfers_make_entries AFTER INSERT ON transfers
BEGIN
    INSERT INTO entries (account_id, transfer_id, amount)
    VALUES (NEW.source_id, NEW.transfer_id, -NEW.amount), (NEW.target_id, NEW.transfer_id, NEW.amount);
END;

CREATE TRIGGER transfers_stay BEFORE DELETE ON transfers
BEGIN SELECT RAISE(ABORT, 'transfers are append-only'); END;

CREATE TRIGGER transfers_never_change BEFORE UPDATE ON transfers
BEGIN SELECT RAISE(ABORT, 'transfers are append-only'); END;

CREATE TRIGGER entries_follow_transfers BEFORE INSERT ON entries WHEN NOT EXISTS (
    SELECT 1 FROM transfers
    WHERE transfer_id = NEW.transfer_id
        AND NEW.amount = CASE NEW.account_id WHEN source_id THEN -amount WHEN target_id THEN amount END
)
BEGIN SELECT RAISE(ABORT, 'an entry is one side of its transfer'); END;

CREATE TRIGGER entries_move_balances AFTER INSERT ON entries
BEGIN UPDATE accounts SET balance = balance + NEW.amount WHERE account_id = NEW.account_id; END;

CREATE TRIGGER entries_stay BEFORE DELETE ON entries
BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;

CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries
BEGIN SELECT RAISE(ABORT, 'entries are append-only'); END;

-- What each captured hold was for. `user_hash` is a keyed hash of the request's member `user`.
CREATE TABLE usage (
    hold_id TEXT PRIMARY KEY REFERENCES holds,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    node_id TEXT NOT NULL,
    tokens INTEGER NOT NULL CHECK (tokens >= 0),
    cost INTEGER NOT NULL CHECK (cost >= 0),
    payable INTEGER NOT NULL CHECK (payable BETWEEN 0 AND cost),
    user_hash TEXT,
    day INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TRIGGER usage_never_changes BEFORE UPDATE ON usage
BEGIN SELECT RAISE(ABORT, 'usage is append-only'); END;

CREATE TRIGGER usage_stays BEFORE DELETE ON usage
BEGIN SELECT RAISE(ABORT, 'usage is append-only'); END;
