-- Runs before the new code. Makes the whole store.
-- Amounts are nano-USD; times (`_ms`) are Unix milliseconds; days are days since 1970-01-01 UTC.
-- The triggers refuse whatever would break a promise of the ledger, so that neither our code nor a shell can break one
-- by accident.

-- -- facts about this store

CREATE TABLE facts (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- -- changes: a version for each kind of record that gateways keep in memory. A gateway that sees a new version reads
-- the records again

CREATE TABLE changes (
    kind TEXT PRIMARY KEY,
    version INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

INSERT INTO changes (kind) VALUES ('keys'), ('nodes'), ('prices');

-- -- accounts: where money can be. `balance` is the sum of the account's entries and `held` the sum of its open holds;
-- only the triggers below move them. A customer may owe up to its credit limit, and never has less than is held

CREATE TABLE accounts (
    account_id TEXT PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('customer', 'revenue', 'credit_source', 'node', 'payouts')),
    balance INTEGER NOT NULL DEFAULT 0,
    held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0),
    credit_limit INTEGER NOT NULL DEFAULT 0 CHECK (credit_limit BETWEEN 0 AND 4611686018427387904),
    created_ms INTEGER NOT NULL,
    -- Whether the account's replies may come from the cache, and what they cost then.
    cache TEXT NOT NULL DEFAULT 'off'
    CHECK (cache IN ('off', 'charged', 'free')) CHECK (kind = 'customer' OR cache = 'off'),
    CHECK (kind <> 'customer' OR balance + credit_limit >= held),
    CHECK (kind = 'customer' OR credit_limit = 0)
) STRICT, WITHOUT ROWID;
CREATE INDEX accounts_by_age ON accounts (created_ms, account_id);

INSERT INTO accounts (account_id, kind, created_ms)
VALUES ('revenue', 'revenue', 0), ('credit_source', 'credit_source', 0), ('payouts', 'payouts', 0);

CREATE TRIGGER accounts_start_empty BEFORE INSERT ON accounts WHEN NEW.balance <> 0 OR NEW.held <> 0
BEGIN SELECT RAISE(ABORT, 'an account starts empty'); END;

CREATE TRIGGER accounts_keep_their_kind BEFORE UPDATE OF account_id, kind ON accounts
BEGIN SELECT RAISE(ABORT, 'an account keeps its id and kind'); END;

CREATE TRIGGER accounts_stay BEFORE DELETE ON accounts
BEGIN SELECT RAISE(ABORT, 'accounts are never deleted'); END;

-- Gateways keep the cache policy in memory with each key of the account.
CREATE TRIGGER accounts_changed AFTER UPDATE OF cache ON accounts WHEN OLD.cache <> NEW.cache
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'keys'; END;

-- -- keys: bearer keys and what they may do. Only a keyed hash of a key is stored; `scopes` are words separated by
-- spaces, `models` ids separated by newlines (none: all models). A limit that is NULL does not exist

CREATE TABLE keys (
    key_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    name TEXT NOT NULL,
    token_hash BLOB NOT NULL UNIQUE CHECK (length(token_hash) = 32),
    scopes TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER,
    revoked_ms INTEGER,
    models TEXT NOT NULL DEFAULT '',
    requests_a_minute INTEGER CHECK (requests_a_minute > 0),
    tokens_a_minute INTEGER CHECK (tokens_a_minute > 0),
    concurrency INTEGER CHECK (concurrency > 0),
    budget_day INTEGER CHECK (budget_day >= 0),
    budget_month INTEGER CHECK (budget_month >= 0),
    rotated_to TEXT,
    last_used_ms INTEGER,
    parent_id TEXT REFERENCES keys
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_of_account ON keys (account_id, created_ms, key_id);
CREATE INDEX keys_by_age ON keys (created_ms, key_id);
CREATE INDEX keys_live ON keys (account_id, coalesce(expires_ms, 9223372036854775807)) WHERE revoked_ms IS NULL;

CREATE TRIGGER keys_have_a_good_parent BEFORE INSERT ON keys WHEN NEW.parent_id IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM keys WHERE key_id = NEW.parent_id AND account_id = NEW.account_id AND revoked_ms IS NULL
)
BEGIN SELECT RAISE(ABORT, 'a key is made by a good key of its account'); END;

CREATE TRIGGER keys_stay BEFORE DELETE ON keys
BEGIN SELECT RAISE(ABORT, 'keys are revoked, and kept for their usage'); END;

CREATE TRIGGER keys_changed AFTER UPDATE OF scopes, expires_ms, revoked_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month ON keys
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'keys'; END;

-- A key that another key made draws from the limits and budgets of all keys above it. They are listed one by one,
-- because a trigger cannot climb.
CREATE TABLE key_draws (
    key_id TEXT NOT NULL REFERENCES keys,
    from_id TEXT NOT NULL REFERENCES keys,
    PRIMARY KEY (key_id, from_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX key_draws_from ON key_draws (from_id);

CREATE TRIGGER keys_draw AFTER INSERT ON keys WHEN NEW.parent_id IS NOT NULL
BEGIN
    INSERT INTO key_draws (key_id, from_id)
    SELECT NEW.key_id, NEW.parent_id UNION ALL SELECT NEW.key_id, from_id FROM key_draws WHERE key_id = NEW.parent_id;
END;

-- What all keys below a key hold now, and what they have spent by day. These are sums, because the number of keys below
-- a key has no bound.
CREATE TABLE drawn (
    key_id TEXT PRIMARY KEY REFERENCES keys,
    holds INTEGER NOT NULL CHECK (holds >= 0),
    held INTEGER NOT NULL CHECK (held >= 0)
) STRICT, WITHOUT ROWID;

CREATE TABLE drawn_days (
    key_id TEXT NOT NULL REFERENCES keys,
    day INTEGER NOT NULL,
    cost INTEGER NOT NULL,
    PRIMARY KEY (key_id, day)
) STRICT, WITHOUT ROWID;

-- -- holds: money set aside, one row a request. `owner` is the gateway that placed it. The moves are those of
-- rules.holds.MOVES

CREATE TABLE holds (
    hold_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT,
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
CREATE INDEX holds_open_of_key ON holds (key_id) WHERE state = 'open';
CREATE INDEX holds_in_flight_at_a_crash ON holds (ended_ms) WHERE ended_by = 'recover';

CREATE TRIGGER holds_start_open BEFORE INSERT ON holds WHEN NEW.state <> 'open'
BEGIN SELECT RAISE(ABORT, 'a hold starts open'); END;

-- A hold is placed only if the account covers it, and the key and all keys above it have room. Otherwise there is no row.
CREATE TRIGGER holds_need_room BEFORE INSERT ON holds
BEGIN
    SELECT RAISE(IGNORE)
    FROM (
        SELECT NEW.key_id AS counted UNION ALL SELECT from_id FROM key_draws WHERE key_id = NEW.key_id
    ) CROSS JOIN keys ON keys.key_id = counted
    WHERE coalesce(concurrency, budget_day, budget_month) IS NOT NULL AND (
        concurrency <= (SELECT count(*) FROM holds WHERE key_id = counted AND state = 'open')
            + coalesce((SELECT holds FROM drawn WHERE key_id = counted), 0)
        OR budget_day < NEW.amount
            + (SELECT coalesce(sum(amount), 0) FROM holds WHERE key_id = counted AND state = 'open')
            + coalesce((SELECT held FROM drawn WHERE key_id = counted), 0)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day = NEW.created_ms / 86400000)
            + coalesce((SELECT cost FROM drawn_days WHERE key_id = counted AND day = NEW.created_ms / 86400000), 0)
        OR budget_month < NEW.amount
            + (SELECT coalesce(sum(amount), 0) FROM holds WHERE key_id = counted AND state = 'open')
            + coalesce((SELECT held FROM drawn WHERE key_id = counted), 0)
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = counted AND day
                BETWEEN unixepoch(NEW.created_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.created_ms / 86400000)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = counted AND day
                BETWEEN unixepoch(NEW.created_ms / 1000, 'unixepoch', 'start of month') / 86400
                AND NEW.created_ms / 86400000)
    );
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    SELECT RAISE(IGNORE) WHERE changes() = 0;
END;

CREATE TRIGGER holds_end_once BEFORE UPDATE ON holds WHEN OLD.state <> 'open'
BEGIN SELECT RAISE(ABORT, 'a hold ends once'); END;

CREATE TRIGGER holds_keep_their_terms
BEFORE UPDATE OF hold_id, account_id, key_id, amount, owner, created_ms, deadline_ms ON holds
BEGIN SELECT RAISE(ABORT, 'a hold keeps its terms'); END;

CREATE TRIGGER holds_stay BEFORE DELETE ON holds
BEGIN SELECT RAISE(ABORT, 'holds are never deleted'); END;

CREATE TRIGGER holds_give_back AFTER UPDATE OF state ON holds WHEN NEW.state <> 'open'
BEGIN UPDATE accounts SET held = held - OLD.amount WHERE account_id = OLD.account_id; END;

-- Triggers of their own for keys that draw: other keys pay for one lookup only.
CREATE TRIGGER holds_draw AFTER INSERT ON holds WHEN EXISTS (SELECT 1 FROM key_draws WHERE key_id = NEW.key_id)
BEGIN
    INSERT INTO drawn (key_id, holds, held) SELECT from_id, 1, NEW.amount FROM key_draws WHERE key_id = NEW.key_id
    ON CONFLICT (key_id) DO UPDATE SET holds = holds + 1, held = held + excluded.held;
END;

CREATE TRIGGER holds_draw_no_more AFTER UPDATE OF state ON holds
WHEN NEW.state <> 'open' AND EXISTS (SELECT 1 FROM key_draws WHERE key_id = OLD.key_id)
BEGIN
    UPDATE drawn SET holds = holds - 1, held = held - OLD.amount
    WHERE key_id IN (SELECT from_id FROM key_draws WHERE key_id = OLD.key_id);
END;

-- -- transfers: money moved from one account to another, in order. Append-only; corrections are new rows. `reference` is
-- an outside name (a payment's) that applies once

CREATE TABLE transfers (
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
-- A hold has one charge, and one payable for each node that did some of its work.
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
BEGIN SELECT RAISE(ABORT, 'a refund is at most what its hold captured, and goes to the account that was charged'); END;

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

-- -- entries: the two sides of each transfer, minus at its source, plus at its target. The trigger on transfers writes
-- them. entries_follow_transfers checks that the transfer exists: a foreign key would need an index of its own

CREATE TABLE entries (
    account_id TEXT NOT NULL REFERENCES accounts,
    transfer_id INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    PRIMARY KEY (account_id, transfer_id)
) STRICT, WITHOUT ROWID;

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

-- -- blocks: the chain over the ledger. A block is a run of transfers; its hash covers them and the block before

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

-- After, not before: SQLite numbers a row only when it inserts it.
CREATE TRIGGER transfers_follow_blocks AFTER INSERT ON transfers
WHEN NEW.transfer_id <= (SELECT max(last_transfer) FROM blocks)
BEGIN SELECT RAISE(ABORT, 'a transfer comes after all blocks'); END;

-- -- usage: what each captured hold was for, one row a request, for as long as it is kept; and its sums by day, key and
-- model, for ever. `user_hash` is a keyed hash of the request's field `user`. A request that is charged by several meters
-- has them in `meters`, as JSON like [["input",10,20000],["output",5,60000]]: meter, quantity, nano-USD per million;
-- `price` is NULL then

CREATE TABLE usage (
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
    day INTEGER NOT NULL,
    meters TEXT CHECK (meters IS NULL OR price IS NULL)
) STRICT, WITHOUT ROWID;
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
CREATE INDEX usage_days_of_account ON usage_days (account_id, day);

CREATE TRIGGER usage_adds_up AFTER INSERT ON usage
BEGIN
    INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
    VALUES (NEW.key_id, NEW.day, NEW.model, NEW.account_id, 1, NEW.tokens, NEW.cost)
    ON CONFLICT (key_id, day, model) DO UPDATE SET
        requests = requests + 1, tokens = tokens + excluded.tokens, cost = cost + excluded.cost;
END;

CREATE TRIGGER usage_draws AFTER INSERT ON usage WHEN EXISTS (SELECT 1 FROM key_draws WHERE key_id = NEW.key_id)
BEGIN
    INSERT INTO drawn_days (key_id, day, cost) SELECT from_id, NEW.day, NEW.cost FROM key_draws WHERE key_id = NEW.key_id
    ON CONFLICT (key_id, day) DO UPDATE SET cost = cost + excluded.cost;
END;

CREATE TRIGGER usage_never_changes BEFORE UPDATE ON usage
BEGIN SELECT RAISE(ABORT, 'usage is append-only'); END;

-- The fact `usage_kept_from_day` is the first day whose rows are kept.
CREATE TRIGGER usage_stays BEFORE DELETE ON usage
WHEN OLD.day >= coalesce((SELECT CAST(value AS INTEGER) FROM facts WHERE name = 'usage_kept_from_day'), 0)
BEGIN SELECT RAISE(ABORT, 'usage is kept until its day is over'); END;

CREATE TRIGGER usage_days_stay BEFORE DELETE ON usage_days
BEGIN SELECT RAISE(ABORT, 'sums of usage are kept'); END;

-- -- prices: nano-USD per million tokens, from a moment on, for one account or for all. Without one, the catalogue's
-- price holds

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

CREATE TRIGGER prices_added AFTER INSERT ON prices
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'prices'; END;

CREATE TRIGGER prices_changed AFTER UPDATE ON prices
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'prices'; END;

-- -- leases: how many requests and tokens of a key's minute gateways have leased

CREATE TABLE leases (
    key_id TEXT NOT NULL,
    minute INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (key_id, minute)
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_by_minute ON leases (minute);

-- -- claims: which request answers for an Idempotency-Key, and its reply once it was delivered, encrypted under the key
-- secret

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

-- How many bytes of replies are kept for an account.
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

-- -- nodes: nodes that asked to join, and servers of other makes. `offers` (JSON) is what a node last signed about
-- itself; `sealed` is the session key, or a server's bearer token, encrypted under the key secret

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

CREATE TRIGGER nodes_added AFTER INSERT ON nodes
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'nodes'; END;

CREATE TRIGGER nodes_changed AFTER UPDATE OF standing, address, ip, certificate, offers, sealed, trusted, weight,
    draining, quarantined, in_flight_max, inputs_max ON nodes
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'nodes'; END;

CREATE TRIGGER nodes_removed AFTER DELETE ON nodes
BEGIN UPDATE changes SET version = version + 1 WHERE kind = 'nodes'; END;

-- Join tokens. `sealed` is the hash of the token's secret, encrypted under the key secret: the hash is enough to join.
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
