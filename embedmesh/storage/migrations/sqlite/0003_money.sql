-- Runs before the new code. Limits and budgets of keys, postpaid accounts, prices, refunds, payouts, kept replies, the
-- chain over the ledger, and what several gateways of one store tell each other.
-- SQLite cannot change a CHECK: accounts, transfers and usage are made anew, with what they have. `PRAGMA foreign_keys`
-- is off while a migration runs, and what it left is checked before it is committed.

-- -- what goes, to be made anew below

DROP TRIGGER accounts_start_empty;
DROP TRIGGER accounts_keep_their_kind;
DROP TRIGGER accounts_stay;
DROP TRIGGER holds_set_aside;
DROP TRIGGER holds_give_back;
DROP TRIGGER holds_keep_their_terms;
DROP TRIGGER transfers_charge_what_was_captured;
DROP TRIGGER transfers_charge_to_revenue;
DROP TRIGGER transfers_make_entries;
DROP TRIGGER transfers_stay;
DROP TRIGGER transfers_never_change;
DROP TRIGGER entries_follow_transfers;
DROP TRIGGER entries_move_balances;
DROP TRIGGER usage_never_changes;
DROP TRIGGER usage_stays;

-- -- accounts: a customer may owe up to its credit limit

CREATE TABLE accounts_anew (
    account_id TEXT PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('customer', 'revenue', 'credit_source', 'node', 'payouts')),
    balance INTEGER NOT NULL DEFAULT 0,
    held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0),
    credit_limit INTEGER NOT NULL DEFAULT 0 CHECK (credit_limit BETWEEN 0 AND 4611686018427387904),
    created_ms INTEGER NOT NULL,
    CHECK (kind <> 'customer' OR balance + credit_limit >= held),
    CHECK (kind = 'customer' OR credit_limit = 0)
) STRICT, WITHOUT ROWID;
INSERT INTO accounts_anew (account_id, kind, balance, held, created_ms)
SELECT account_id, kind, balance, held, created_ms FROM accounts;
DROP TABLE accounts;
ALTER TABLE accounts_anew RENAME TO accounts;
INSERT INTO accounts (account_id, kind, created_ms) VALUES ('payouts', 'payouts', 0);
CREATE INDEX accounts_by_age ON accounts (created_ms, account_id);

CREATE TRIGGER accounts_start_empty BEFORE INSERT ON accounts WHEN NEW.balance <> 0 OR NEW.held <> 0
BEGIN SELECT RAISE(ABORT, 'an account starts empty'); END;

CREATE TRIGGER accounts_keep_their_kind BEFORE UPDATE OF account_id, kind ON accounts
BEGIN SELECT RAISE(ABORT, 'an account keeps its id and kind'); END;

CREATE TRIGGER accounts_stay BEFORE DELETE ON accounts
BEGIN SELECT RAISE(ABORT, 'accounts are never deleted'); END;

-- -- keys: what a key may do is not only its scopes. Null is: no limit; no models: all of them

ALTER TABLE keys ADD COLUMN models TEXT NOT NULL DEFAULT '';
ALTER TABLE keys ADD COLUMN requests_a_minute INTEGER CHECK (requests_a_minute > 0);
ALTER TABLE keys ADD COLUMN tokens_a_minute INTEGER CHECK (tokens_a_minute > 0);
ALTER TABLE keys ADD COLUMN concurrency INTEGER CHECK (concurrency > 0);
ALTER TABLE keys ADD COLUMN budget_day INTEGER CHECK (budget_day >= 0);
ALTER TABLE keys ADD COLUMN budget_month INTEGER CHECK (budget_month >= 0);
ALTER TABLE keys ADD COLUMN rotated_to TEXT;
ALTER TABLE keys ADD COLUMN last_used_ms INTEGER;
CREATE INDEX keys_of_account ON keys (account_id, created_ms, key_id);
CREATE INDEX keys_by_age ON keys (created_ms, key_id);

CREATE TRIGGER keys_stay BEFORE DELETE ON keys
BEGIN SELECT RAISE(ABORT, 'keys are revoked, and kept for their usage'); END;

-- -- what gateways of one store tell each other: whoever sees a new version reads what it is about anew

CREATE TABLE topics (
    topic TEXT PRIMARY KEY,
    version INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
INSERT INTO topics (topic) VALUES ('keys'), ('nodes'), ('prices');

CREATE TRIGGER keys_tell AFTER UPDATE OF scopes, expires_ms, revoked_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month ON keys
BEGIN UPDATE topics SET version = version + 1 WHERE topic = 'keys'; END;

CREATE TRIGGER nodes_tell AFTER INSERT ON nodes
BEGIN UPDATE topics SET version = version + 1 WHERE topic = 'nodes'; END;

CREATE TRIGGER nodes_tell_changes AFTER UPDATE OF standing, address, ip, certificate, offers, sealed, trusted, weight,
    draining, quarantined, in_flight_max, inputs_max ON nodes
BEGIN UPDATE topics SET version = version + 1 WHERE topic = 'nodes'; END;

CREATE TRIGGER nodes_tell_of_removal AFTER DELETE ON nodes
BEGIN UPDATE topics SET version = version + 1 WHERE topic = 'nodes'; END;

-- -- holds: by which key

ALTER TABLE holds ADD COLUMN key_id TEXT;
CREATE INDEX holds_open_of_key ON holds (key_id) WHERE state = 'open';
CREATE INDEX holds_in_flight_at_a_crash ON holds (ended_ms) WHERE ended_by = 'recover';

CREATE TRIGGER holds_keep_their_terms
BEFORE UPDATE OF hold_id, account_id, key_id, amount, owner, created_ms, deadline_ms ON holds
BEGIN SELECT RAISE(ABORT, 'a hold keeps its terms'); END;

CREATE TRIGGER holds_give_back AFTER UPDATE OF state ON holds WHEN NEW.state <> 'open'
BEGIN UPDATE accounts SET held = held - OLD.amount WHERE account_id = OLD.account_id; END;

-- -- transfers: refunds and payouts too

CREATE TABLE transfers_anew (
    transfer_id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('credit', 'charge', 'payable', 'refund', 'payout')),
    source_id TEXT NOT NULL REFERENCES accounts,
    target_id TEXT NOT NULL REFERENCES accounts,
    amount INTEGER NOT NULL CHECK (amount BETWEEN 0 AND 4611686018427387904),
    hold_id TEXT REFERENCES holds,
    reference TEXT UNIQUE,
    created_ms INTEGER NOT NULL,
    CHECK (source_id <> target_id),
    CHECK ((kind IN ('credit', 'payout')) = (hold_id IS NULL)),
    CHECK ((kind IN ('credit', 'payout', 'refund')) = (reference IS NOT NULL))
) STRICT;
INSERT INTO transfers_anew (transfer_id, kind, source_id, target_id, amount, hold_id, reference, created_ms)
SELECT transfer_id, kind, source_id, target_id, amount, hold_id, reference, created_ms FROM transfers;
DROP TABLE transfers;
ALTER TABLE transfers_anew RENAME TO transfers;
CREATE UNIQUE INDEX transfers_once_a_hold ON transfers (hold_id, kind, target_id, coalesce(reference, ''))
WHERE hold_id IS NOT NULL;

CREATE TRIGGER transfers_charge_what_was_captured BEFORE INSERT ON transfers WHEN NEW.kind = 'charge' AND NOT EXISTS (
    SELECT 1 FROM holds
    WHERE hold_id = NEW.hold_id AND account_id = NEW.source_id AND captured = NEW.amount AND NEW.target_id = 'revenue'
)
BEGIN SELECT RAISE(ABORT, 'a charge is what its hold captured, and goes to revenue'); END;

CREATE TRIGGER transfers_pay_nodes BEFORE INSERT ON transfers WHEN NEW.kind = 'payable' AND (
    NEW.source_id <> 'revenue' OR NOT EXISTS (SELECT 1 FROM accounts WHERE account_id = NEW.target_id AND kind = 'node')
)
BEGIN SELECT RAISE(ABORT, 'a payable goes from revenue to a node'); END;

CREATE TRIGGER transfers_refund_what_was_charged BEFORE INSERT ON transfers WHEN NEW.kind = 'refund' AND NOT EXISTS (
    SELECT 1 FROM holds
    WHERE hold_id = NEW.hold_id AND account_id = NEW.target_id AND NEW.source_id = 'revenue' AND captured >= NEW.amount
        + (SELECT coalesce(sum(amount), 0) FROM transfers WHERE hold_id = NEW.hold_id AND kind = 'refund')
)
BEGIN SELECT RAISE(ABORT, 'a refund is at most what its hold captured, and goes to whom it was charged'); END;

CREATE TRIGGER transfers_credit_customers BEFORE INSERT ON transfers WHEN NEW.kind = 'credit' AND NOT EXISTS (
    SELECT 1 FROM accounts WHERE kind = 'customer' AND (
        (account_id = NEW.target_id AND NEW.source_id = 'credit_source')
        OR (account_id = NEW.source_id AND NEW.target_id = 'credit_source')
    )
)
BEGIN SELECT RAISE(ABORT, 'a credit is between the credit source and a customer'); END;

CREATE TRIGGER transfers_pay_out_what_nodes_have BEFORE INSERT ON transfers WHEN NEW.kind = 'payout' AND NOT EXISTS (
    SELECT 1 FROM accounts
    WHERE account_id = NEW.source_id AND kind = 'node' AND balance >= NEW.amount AND NEW.target_id = 'payouts'
)
BEGIN SELECT RAISE(ABORT, 'a payout is at most what a node has'); END;

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

-- -- the chain: a block is some transfers that follow each other; its hash covers them and the block before

CREATE TABLE blocks (
    last_transfer INTEGER PRIMARY KEY,
    transfers INTEGER NOT NULL CHECK (transfers > 0),
    hash BLOB NOT NULL CHECK (length(hash) = 32),
    created_ms INTEGER NOT NULL
) STRICT;

CREATE TRIGGER blocks_grow BEFORE INSERT ON blocks WHEN NEW.last_transfer <= (SELECT max(last_transfer) FROM blocks)
BEGIN SELECT RAISE(ABORT, 'a block follows all others'); END;

CREATE TRIGGER blocks_stay BEFORE DELETE ON blocks
BEGIN SELECT RAISE(ABORT, 'blocks are append-only'); END;

CREATE TRIGGER blocks_never_change BEFORE UPDATE ON blocks
BEGIN SELECT RAISE(ABORT, 'blocks are append-only'); END;

-- After, not before: a row that gets its number from SQLite has none before.
CREATE TRIGGER transfers_follow_blocks AFTER INSERT ON transfers
WHEN NEW.transfer_id <= (SELECT max(last_transfer) FROM blocks)
BEGIN SELECT RAISE(ABORT, 'a transfer comes after all blocks'); END;

-- -- usage: one row a request, for as long as it is kept; and its sums by day, key and model, for ever

CREATE TABLE usage_anew (
    hold_id TEXT PRIMARY KEY REFERENCES holds,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    node_id TEXT NOT NULL,
    tokens INTEGER NOT NULL CHECK (tokens >= 0),
    price INTEGER CHECK (price >= 0),
    cost INTEGER NOT NULL CHECK (cost >= 0),
    payable INTEGER NOT NULL CHECK (payable BETWEEN 0 AND cost),
    user_hash TEXT,
    day INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO usage_anew (hold_id, account_id, key_id, model, node_id, tokens, cost, payable, user_hash, day)
SELECT hold_id, account_id, key_id, model, node_id, tokens, cost, payable, user_hash, day FROM usage;
DROP TABLE usage;
ALTER TABLE usage_anew RENAME TO usage;
CREATE INDEX usage_by_day ON usage (day);

CREATE TABLE usage_days (
    key_id TEXT NOT NULL,
    day INTEGER NOT NULL,
    model TEXT NOT NULL,
    account_id TEXT NOT NULL REFERENCES accounts,
    requests INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    PRIMARY KEY (key_id, day, model)
) STRICT, WITHOUT ROWID;
INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
SELECT key_id, day, model, account_id, count(*), sum(tokens), sum(cost) FROM usage GROUP BY key_id, day, model, account_id;
CREATE INDEX usage_days_of_account ON usage_days (account_id, day);

CREATE TRIGGER usage_adds_up AFTER INSERT ON usage
BEGIN
    INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
    VALUES (NEW.key_id, NEW.day, NEW.model, NEW.account_id, 1, NEW.tokens, NEW.cost)
    ON CONFLICT (key_id, day, model) DO UPDATE SET
        requests = requests + 1, tokens = tokens + excluded.tokens, cost = cost + excluded.cost;
END;

CREATE TRIGGER usage_never_changes BEFORE UPDATE ON usage
BEGIN SELECT RAISE(ABORT, 'usage is append-only'); END;

-- The fact `usage_kept_from_day` is the first day whose rows are kept.
CREATE TRIGGER usage_stays BEFORE DELETE ON usage
WHEN OLD.day >= coalesce((SELECT CAST(value AS INTEGER) FROM facts WHERE name = 'usage_kept_from_day'), 0)
BEGIN SELECT RAISE(ABORT, 'usage is kept until its day is over'); END;

CREATE TRIGGER usage_days_stay BEFORE DELETE ON usage_days
BEGIN SELECT RAISE(ABORT, 'sums of usage are kept'); END;

-- A hold is placed only if the account covers it and the key has room; no row otherwise.
CREATE TRIGGER holds_need_room BEFORE INSERT ON holds
BEGIN
    SELECT RAISE(IGNORE) FROM keys WHERE key_id = NEW.key_id AND (
        concurrency <= (SELECT count(*) FROM holds WHERE key_id = NEW.key_id AND state = 'open')
        OR budget_day < NEW.amount
            + (SELECT coalesce(sum(amount), 0) FROM holds WHERE key_id = NEW.key_id AND state = 'open')
            + (SELECT coalesce(sum(cost), 0) FROM usage_days
                WHERE key_id = NEW.key_id AND day = NEW.created_ms / 86400000)
        OR budget_month < NEW.amount
            + (SELECT coalesce(sum(amount), 0) FROM holds WHERE key_id = NEW.key_id AND state = 'open')
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = NEW.key_id AND day
                BETWEEN unixepoch(NEW.created_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.created_ms / 86400000)
    );
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    SELECT RAISE(IGNORE) WHERE changes() = 0;
END;

-- -- prices: nano-USD per million tokens, from a moment on, for one account or for all; the catalogue's where there is none

CREATE TABLE prices (
    price_id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    account_id TEXT REFERENCES accounts,
    price INTEGER NOT NULL CHECK (price BETWEEN 0 AND 1000000000000000),
    from_ms INTEGER NOT NULL,
    to_ms INTEGER CHECK (to_ms >= from_ms),
    created_ms INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX prices_one_at_a_time ON prices (model, coalesce(account_id, '')) WHERE to_ms IS NULL;
CREATE INDEX prices_of_model ON prices (model, account_id, from_ms);

CREATE TRIGGER prices_only_end BEFORE UPDATE ON prices
WHEN NEW.to_ms > OLD.to_ms OR NEW.to_ms IS NULL OR OLD.price_id <> NEW.price_id OR OLD.model <> NEW.model
    OR OLD.account_id IS NOT NEW.account_id OR OLD.price <> NEW.price OR OLD.from_ms <> NEW.from_ms
BEGIN SELECT RAISE(ABORT, 'a price only ends'); END;

CREATE TRIGGER prices_stay BEFORE DELETE ON prices
BEGIN SELECT RAISE(ABORT, 'prices are kept'); END;

CREATE TRIGGER prices_tell AFTER INSERT ON prices
BEGIN UPDATE topics SET version = version + 1 WHERE topic = 'prices'; END;

CREATE TRIGGER prices_tell_changes AFTER UPDATE ON prices
BEGIN UPDATE topics SET version = version + 1 WHERE topic = 'prices'; END;

-- -- limits: how much of a key's minute was granted to gateways

CREATE TABLE grants (
    key_id TEXT NOT NULL,
    minute INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (key_id, minute)
) STRICT, WITHOUT ROWID;
CREATE INDEX grants_by_minute ON grants (minute);

-- -- idempotency: which request answers for an Idempotency-Key, and its reply once it was delivered, encrypted under the
-- key secret

CREATE TABLE claims (
    account_id TEXT NOT NULL REFERENCES accounts,
    key_hash BLOB NOT NULL CHECK (length(key_hash) = 32),
    body_hash BLOB NOT NULL CHECK (length(body_hash) = 32),
    hold_id TEXT NOT NULL UNIQUE,
    created_ms INTEGER NOT NULL,
    reply BLOB,
    PRIMARY KEY (account_id, key_hash)
) STRICT, WITHOUT ROWID;
CREATE INDEX claims_by_age ON claims (created_ms);

CREATE TABLE kept_replies (
    account_id TEXT PRIMARY KEY REFERENCES accounts,
    bytes INTEGER NOT NULL CHECK (bytes >= 0)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER claims_count AFTER UPDATE OF reply ON claims
BEGIN
    INSERT INTO kept_replies (account_id, bytes)
    VALUES (NEW.account_id, 0) ON CONFLICT DO NOTHING;
    UPDATE kept_replies SET bytes = bytes + coalesce(length(NEW.reply), 0) - coalesce(length(OLD.reply), 0)
    WHERE account_id = NEW.account_id;
END;

CREATE TRIGGER claims_count_down AFTER DELETE ON claims WHEN OLD.reply IS NOT NULL
BEGIN UPDATE kept_replies SET bytes = bytes - length(OLD.reply) WHERE account_id = OLD.account_id; END;
