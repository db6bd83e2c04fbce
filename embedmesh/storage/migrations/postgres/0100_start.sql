-- Runs before the new code. Makes the whole store, with the same tables as SQLite's script: see there for what each
-- table is. Amounts are nano-USD; times (`_ms`) are Unix milliseconds; days are days since 1970-01-01 UTC.
-- The triggers refuse whatever would break a promise of the ledger, so that neither our code nor a shell can break one
-- by accident. Triggers that only add up run once a statement, not once a row: a batch moves a balance once.

CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'check_violation';
END $$;

-- -- facts about this store

CREATE TABLE facts (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

-- -- changes: gateways that listen hear of them at once

CREATE TABLE changes (
    kind TEXT PRIMARY KEY,
    version BIGINT NOT NULL DEFAULT 0
);
INSERT INTO changes (kind) VALUES ('keys'), ('nodes'), ('prices');

CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE changes SET version = version + 1 WHERE kind = TG_ARGV[0];
    PERFORM pg_notify('embedmesh', TG_ARGV[0]);
    RETURN NULL;
END $$;

-- -- accounts

CREATE TABLE accounts (
    account_id TEXT PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('customer', 'revenue', 'credit_source', 'node', 'payouts')),
    balance BIGINT NOT NULL DEFAULT 0,
    held BIGINT NOT NULL DEFAULT 0 CHECK (held >= 0),
    credit_limit BIGINT NOT NULL DEFAULT 0 CHECK (credit_limit BETWEEN 0 AND 4611686018427387904),
    created_ms BIGINT NOT NULL,
    cache TEXT NOT NULL DEFAULT 'off'
    CHECK (cache IN ('off', 'charged', 'free')) CHECK (kind = 'customer' OR cache = 'off'),
    CHECK (kind <> 'customer' OR balance + credit_limit >= held),
    CHECK (kind = 'customer' OR credit_limit = 0)
) WITH (fillfactor = 60);  -- a balance changes all the time: with room beside the row the indices stay as they are
CREATE INDEX accounts_by_age ON accounts (created_ms, account_id);

INSERT INTO accounts (account_id, kind, created_ms)
VALUES ('revenue', 'revenue', 0), ('credit_source', 'credit_source', 0), ('payouts', 'payouts', 0);

CREATE TRIGGER accounts_start_empty BEFORE INSERT ON accounts FOR EACH ROW
WHEN (NEW.balance <> 0 OR NEW.held <> 0) EXECUTE FUNCTION refuse('an account starts empty');

CREATE TRIGGER accounts_keep_their_kind BEFORE UPDATE OF account_id, kind ON accounts FOR EACH ROW
EXECUTE FUNCTION refuse('an account keeps its id and kind');

CREATE TRIGGER accounts_stay BEFORE DELETE ON accounts FOR EACH ROW EXECUTE FUNCTION refuse('accounts are never deleted');
CREATE TRIGGER accounts_stay_all BEFORE TRUNCATE ON accounts EXECUTE FUNCTION refuse('accounts are never deleted');

-- Gateways keep the cache policy in memory with each key of the account.
CREATE TRIGGER accounts_changed AFTER UPDATE OF cache ON accounts FOR EACH ROW
WHEN (OLD.cache <> NEW.cache) EXECUTE FUNCTION note_change('keys');

-- -- keys

CREATE TABLE keys (
    key_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    name TEXT NOT NULL,
    token_hash BYTEA NOT NULL UNIQUE CHECK (length(token_hash) = 32),
    scopes TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT,
    revoked_ms BIGINT,
    models TEXT NOT NULL DEFAULT '',
    requests_a_minute BIGINT CHECK (requests_a_minute > 0),
    tokens_a_minute BIGINT CHECK (tokens_a_minute > 0),
    concurrency BIGINT CHECK (concurrency > 0),
    budget_day BIGINT CHECK (budget_day >= 0),
    budget_month BIGINT CHECK (budget_month >= 0),
    rotated_to TEXT,
    last_used_ms BIGINT,
    parent_id TEXT REFERENCES keys
);
CREATE INDEX keys_of_account ON keys (account_id, created_ms, key_id);
CREATE INDEX keys_by_age ON keys (created_ms, key_id);
CREATE INDEX keys_live ON keys (account_id, coalesce(expires_ms, 9223372036854775807)) WHERE revoked_ms IS NULL;

CREATE FUNCTION need_a_good_parent() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM keys WHERE key_id = NEW.parent_id AND account_id = NEW.account_id AND revoked_ms IS NULL
    ) THEN
        RAISE EXCEPTION 'a key is made by a good key of its account' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER keys_have_a_good_parent BEFORE INSERT ON keys FOR EACH ROW WHEN (NEW.parent_id IS NOT NULL)
EXECUTE FUNCTION need_a_good_parent();

CREATE TRIGGER keys_stay BEFORE DELETE ON keys FOR EACH ROW
EXECUTE FUNCTION refuse('keys are revoked, and kept for their usage');

CREATE TRIGGER keys_changed AFTER UPDATE OF scopes, expires_ms, revoked_ms, models, requests_a_minute, tokens_a_minute,
    concurrency, budget_day, budget_month ON keys EXECUTE FUNCTION note_change('keys');

CREATE TABLE key_draws (
    key_id TEXT NOT NULL REFERENCES keys,
    from_id TEXT NOT NULL REFERENCES keys,
    PRIMARY KEY (key_id, from_id)
);
CREATE INDEX key_draws_from ON key_draws (from_id);

CREATE FUNCTION draw() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_draws (key_id, from_id)
    SELECT NEW.key_id, NEW.parent_id UNION ALL SELECT NEW.key_id, from_id FROM key_draws WHERE key_id = NEW.parent_id;
    RETURN NULL;
END $$;

CREATE TRIGGER keys_draw AFTER INSERT ON keys FOR EACH ROW WHEN (NEW.parent_id IS NOT NULL) EXECUTE FUNCTION draw();

CREATE TABLE drawn (
    key_id TEXT PRIMARY KEY REFERENCES keys,
    holds BIGINT NOT NULL CHECK (holds >= 0),
    held BIGINT NOT NULL CHECK (held >= 0)
) WITH (fillfactor = 60);

CREATE TABLE drawn_days (
    key_id TEXT NOT NULL REFERENCES keys,
    day BIGINT NOT NULL,
    cost BIGINT NOT NULL,
    PRIMARY KEY (key_id, day)
) WITH (fillfactor = 60);

-- -- holds

CREATE TABLE holds (
    hold_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT,
    amount BIGINT NOT NULL CHECK (amount BETWEEN 0 AND 4611686018427387904),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'captured', 'released')),
    ended_by TEXT,
    captured BIGINT CHECK (captured BETWEEN 0 AND amount),
    owner TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    deadline_ms BIGINT NOT NULL,
    ended_ms BIGINT,
    CHECK ((state = 'open') = (ended_by IS NULL)),
    CHECK ((state = 'open') = (ended_ms IS NULL)),
    CHECK ((state = 'captured') = (captured IS NOT NULL)),
    CHECK ((state = 'captured') = (ended_by IS NOT DISTINCT FROM 'capture')),
    CHECK (ended_by IS NULL OR ended_by IN ('capture', 'release', 'expire', 'recover'))
);
CREATE INDEX holds_open ON holds (deadline_ms) WHERE state = 'open';
CREATE INDEX holds_open_of_key ON holds (key_id) WHERE state = 'open';
CREATE INDEX holds_in_flight_at_a_crash ON holds (ended_ms) WHERE ended_by = 'recover';

CREATE TRIGGER holds_start_open BEFORE INSERT ON holds FOR EACH ROW
WHEN (NEW.state <> 'open') EXECUTE FUNCTION refuse('a hold starts open');

-- Whether a key may hold `wanted` more, counting what it and all keys below it hold and have spent.
CREATE FUNCTION has_room(key keys, wanted BIGINT, now_ms BIGINT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$
DECLARE
    open_holds BIGINT;
    open_amount BIGINT;
    today BIGINT := now_ms / 86400000;
    first_day BIGINT;
BEGIN
    SELECT count(*), coalesce(sum(amount), 0) INTO open_holds, open_amount
    FROM holds WHERE key_id = key.key_id AND state = 'open';
    SELECT open_holds + coalesce(sum(holds), 0), open_amount + coalesce(sum(held), 0) INTO open_holds, open_amount
    FROM drawn WHERE key_id = key.key_id;
    IF key.concurrency <= open_holds
        OR key.budget_day < wanted + open_amount
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = key.key_id AND day = today)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = key.key_id AND day = today)
    THEN
        RETURN FALSE;
    END IF;
    IF key.budget_month IS NOT NULL THEN
        first_day := CAST(
            extract(epoch FROM date_trunc('month', to_timestamp(now_ms / 1000), 'UTC')) AS BIGINT
        ) / 86400;
        RETURN key.budget_month >= wanted + open_amount
            + (SELECT coalesce(sum(cost), 0) FROM usage_days WHERE key_id = key.key_id AND day BETWEEN first_day AND today)
            + (SELECT coalesce(sum(cost), 0) FROM drawn_days WHERE key_id = key.key_id AND day BETWEEN first_day AND today);
    END IF;
    RETURN TRUE;
END $$;

-- A hold is placed only if the account covers it, and the key and all keys above it have room. Otherwise there is no row.
-- Holds of one account are placed one after the other: the transaction that places them has locked it.
CREATE FUNCTION need_room() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    key keys%ROWTYPE;
    above keys%ROWTYPE;
BEGIN
    SELECT * INTO key FROM keys WHERE key_id = NEW.key_id
        AND (concurrency IS NOT NULL OR budget_day IS NOT NULL OR budget_month IS NOT NULL OR parent_id IS NOT NULL);
    IF FOUND AND NOT has_room(key, NEW.amount, NEW.created_ms) THEN
        RETURN NULL;
    END IF;
    IF key.parent_id IS NOT NULL THEN
        FOR above IN
            SELECT keys.* FROM key_draws JOIN keys ON keys.key_id = from_id WHERE key_draws.key_id = NEW.key_id
                AND (concurrency IS NOT NULL OR budget_day IS NOT NULL OR budget_month IS NOT NULL)
        LOOP
            IF NOT has_room(above, NEW.amount, NEW.created_ms) THEN
                RETURN NULL;
            END IF;
        END LOOP;
    END IF;
    UPDATE accounts SET held = held + NEW.amount
    WHERE account_id = NEW.account_id AND kind = 'customer' AND balance + credit_limit - held >= NEW.amount;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF key.parent_id IS NOT NULL THEN
        INSERT INTO drawn (key_id, holds, held) SELECT from_id, 1, NEW.amount FROM key_draws WHERE key_id = NEW.key_id
        ON CONFLICT (key_id) DO UPDATE SET holds = drawn.holds + 1, held = drawn.held + excluded.held;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER holds_need_room BEFORE INSERT ON holds FOR EACH ROW EXECUTE FUNCTION need_room();

CREATE TRIGGER holds_end_once BEFORE UPDATE ON holds FOR EACH ROW
WHEN (OLD.state <> 'open') EXECUTE FUNCTION refuse('a hold ends once');

CREATE TRIGGER holds_keep_their_terms
BEFORE UPDATE OF hold_id, account_id, key_id, amount, owner, created_ms, deadline_ms ON holds FOR EACH ROW
EXECUTE FUNCTION refuse('a hold keeps its terms');

CREATE TRIGGER holds_stay BEFORE DELETE ON holds FOR EACH ROW EXECUTE FUNCTION refuse('holds are never deleted');
CREATE TRIGGER holds_stay_all BEFORE TRUNCATE ON holds EXECUTE FUNCTION refuse('holds are never deleted');

CREATE FUNCTION give_back() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE accounts SET held = held - ended.amount
    FROM (
        SELECT account_id, CAST(sum(amount) AS BIGINT) AS amount FROM after WHERE state <> 'open' GROUP BY account_id
    ) AS ended
    WHERE accounts.account_id = ended.account_id;
    IF EXISTS (SELECT 1 FROM after JOIN key_draws USING (key_id)) THEN
        UPDATE drawn SET holds = drawn.holds - ended.holds, held = held - ended.amount
        FROM (
            SELECT from_id, count(*) AS holds, CAST(sum(amount) AS BIGINT) AS amount
            FROM after JOIN key_draws USING (key_id) WHERE state <> 'open' GROUP BY from_id
        ) AS ended
        WHERE drawn.key_id = ended.from_id;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER holds_give_back AFTER UPDATE ON holds REFERENCING NEW TABLE AS after EXECUTE FUNCTION give_back();

-- -- transfers, entries and blocks

CREATE TABLE transfers (
    transfer_id BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('credit', 'charge', 'payable', 'refund', 'payout')),
    source_id TEXT NOT NULL REFERENCES accounts,
    target_id TEXT NOT NULL REFERENCES accounts,
    amount BIGINT NOT NULL CHECK (amount BETWEEN 0 AND 4611686018427387904),
    hold_id TEXT REFERENCES holds,
    reference TEXT UNIQUE,
    created_ms BIGINT NOT NULL,
    CHECK (source_id <> target_id),
    CHECK ((kind IN ('credit', 'payout')) = (hold_id IS NULL)),
    CHECK ((kind IN ('credit', 'payout', 'refund')) = (reference IS NOT NULL))
);
CREATE UNIQUE INDEX transfers_once_a_hold ON transfers (hold_id, kind, target_id, coalesce(reference, ''))
WHERE hold_id IS NOT NULL;

-- The trigger on transfers writes them, and the one on entries compares them: foreign keys would be looked up row by
-- row.
CREATE TABLE entries (
    account_id TEXT NOT NULL,
    transfer_id BIGINT NOT NULL,
    amount BIGINT NOT NULL,
    PRIMARY KEY (account_id, transfer_id)
);

CREATE TABLE blocks (
    last_transfer BIGINT PRIMARY KEY,
    transfers BIGINT NOT NULL CHECK (transfers > 0),
    hash BYTEA NOT NULL CHECK (length(hash) = 32),
    created_ms BIGINT NOT NULL
);

CREATE FUNCTION check_transfer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.transfer_id <= (SELECT max(last_transfer) FROM blocks) THEN
        RAISE EXCEPTION 'a transfer comes after all blocks' USING ERRCODE = 'check_violation';
    ELSIF NEW.kind = 'charge' THEN
        IF NOT EXISTS (
            SELECT 1 FROM holds WHERE hold_id = NEW.hold_id AND account_id = NEW.source_id
                AND captured = NEW.amount AND NEW.target_id = 'revenue'
        ) THEN
            RAISE EXCEPTION 'a charge is what its hold captured, and goes to revenue' USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NEW.kind = 'payable' THEN
        IF NEW.source_id <> 'revenue' OR NOT EXISTS (
            SELECT 1 FROM accounts WHERE account_id = NEW.target_id AND kind = 'node'
        ) THEN
            RAISE EXCEPTION 'a payable goes from revenue to a node' USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NEW.kind = 'refund' THEN
        IF NOT EXISTS (
            SELECT 1 FROM holds
            WHERE hold_id = NEW.hold_id AND account_id = NEW.target_id AND NEW.source_id = 'revenue'
                AND captured >= NEW.amount
                + (SELECT coalesce(sum(amount), 0) FROM transfers WHERE hold_id = NEW.hold_id AND kind = 'refund')
        ) THEN
            RAISE EXCEPTION 'a refund is at most what its hold captured, and goes to the account that was charged'
                USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NEW.kind = 'credit' THEN
        IF NOT EXISTS (
            SELECT 1 FROM accounts WHERE kind = 'customer' AND (
                (account_id = NEW.target_id AND NEW.source_id = 'credit_source')
                OR (account_id = NEW.source_id AND NEW.target_id = 'credit_source')
            )
        ) THEN
            RAISE EXCEPTION 'a credit is between the credit source and a customer' USING ERRCODE = 'check_violation';
        END IF;
    ELSIF NOT EXISTS (
        SELECT 1 FROM accounts
        WHERE account_id = NEW.source_id AND kind = 'node' AND balance >= NEW.amount AND NEW.target_id = 'payouts'
    ) THEN
        RAISE EXCEPTION 'a payout is at most what a node has' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER transfers_are_what_they_say BEFORE INSERT ON transfers FOR EACH ROW EXECUTE FUNCTION check_transfer();

CREATE FUNCTION make_entries() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO entries (account_id, transfer_id, amount)
    SELECT source_id, transfer_id, -amount FROM added UNION ALL SELECT target_id, transfer_id, amount FROM added;
    RETURN NULL;
END $$;

CREATE TRIGGER transfers_make_entries AFTER INSERT ON transfers REFERENCING NEW TABLE AS added
EXECUTE FUNCTION make_entries();

CREATE TRIGGER transfers_stay BEFORE DELETE ON transfers FOR EACH ROW EXECUTE FUNCTION refuse('transfers are append-only');
CREATE TRIGGER transfers_stay_all BEFORE TRUNCATE ON transfers EXECUTE FUNCTION refuse('transfers are append-only');
CREATE TRIGGER transfers_never_change BEFORE UPDATE ON transfers FOR EACH ROW
EXECUTE FUNCTION refuse('transfers are append-only');

CREATE FUNCTION move_balances() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT 1 FROM added WHERE amount IS DISTINCT FROM (
            SELECT CASE added.account_id WHEN source_id THEN -transfers.amount WHEN target_id THEN transfers.amount END
            FROM transfers WHERE transfers.transfer_id = added.transfer_id
        )
    ) THEN
        RAISE EXCEPTION 'an entry is one side of its transfer' USING ERRCODE = 'check_violation';
    END IF;
    UPDATE accounts SET balance = balance + moved.amount
    FROM (SELECT account_id, CAST(sum(amount) AS BIGINT) AS amount FROM added GROUP BY account_id) AS moved
    WHERE accounts.account_id = moved.account_id;
    RETURN NULL;
END $$;

CREATE TRIGGER entries_move_balances AFTER INSERT ON entries REFERENCING NEW TABLE AS added
EXECUTE FUNCTION move_balances();

CREATE TRIGGER entries_stay BEFORE DELETE ON entries FOR EACH ROW EXECUTE FUNCTION refuse('entries are append-only');
CREATE TRIGGER entries_stay_all BEFORE TRUNCATE ON entries EXECUTE FUNCTION refuse('entries are append-only');
CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries FOR EACH ROW
EXECUTE FUNCTION refuse('entries are append-only');

CREATE FUNCTION follow_blocks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.last_transfer <= (SELECT max(last_transfer) FROM blocks) THEN
        RAISE EXCEPTION 'a block follows all others' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER blocks_grow BEFORE INSERT ON blocks FOR EACH ROW EXECUTE FUNCTION follow_blocks();
CREATE TRIGGER blocks_stay BEFORE DELETE ON blocks FOR EACH ROW EXECUTE FUNCTION refuse('blocks are append-only');
CREATE TRIGGER blocks_stay_all BEFORE TRUNCATE ON blocks EXECUTE FUNCTION refuse('blocks are append-only');
CREATE TRIGGER blocks_never_change BEFORE UPDATE ON blocks FOR EACH ROW
EXECUTE FUNCTION refuse('blocks are append-only');

-- -- usage

CREATE TABLE usage (
    hold_id TEXT PRIMARY KEY REFERENCES holds,
    account_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    node_id TEXT NOT NULL,
    tokens BIGINT NOT NULL CHECK (tokens >= 0),
    price BIGINT CHECK (price >= 0),
    cost BIGINT NOT NULL CHECK (cost >= 0),
    payable BIGINT NOT NULL CHECK (payable BETWEEN 0 AND cost),
    user_hash TEXT,
    day BIGINT NOT NULL,
    meters TEXT CHECK (meters IS NULL OR price IS NULL)
);
CREATE INDEX usage_by_day ON usage (day);

CREATE TABLE usage_days (
    key_id TEXT NOT NULL,
    day BIGINT NOT NULL,
    model TEXT NOT NULL,
    account_id TEXT NOT NULL,
    requests BIGINT NOT NULL,
    tokens BIGINT NOT NULL,
    cost BIGINT NOT NULL,
    PRIMARY KEY (key_id, day, model)
) WITH (fillfactor = 60);
CREATE INDEX usage_days_of_account ON usage_days (account_id, day);

CREATE FUNCTION add_usage_up() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_days (key_id, day, model, account_id, requests, tokens, cost)
    SELECT key_id, day, model, min(account_id), count(*), sum(tokens), sum(cost) FROM added
    GROUP BY key_id, day, model ORDER BY key_id, day, model
    ON CONFLICT (key_id, day, model) DO UPDATE SET
        requests = usage_days.requests + excluded.requests, tokens = usage_days.tokens + excluded.tokens,
        cost = usage_days.cost + excluded.cost;
    IF EXISTS (SELECT 1 FROM added JOIN key_draws USING (key_id)) THEN
        INSERT INTO drawn_days (key_id, day, cost)
        SELECT from_id, day, sum(cost) FROM added JOIN key_draws USING (key_id) GROUP BY from_id, day ORDER BY from_id, day
        ON CONFLICT (key_id, day) DO UPDATE SET cost = drawn_days.cost + excluded.cost;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER usage_adds_up AFTER INSERT ON usage REFERENCING NEW TABLE AS added EXECUTE FUNCTION add_usage_up();

CREATE TRIGGER usage_never_changes BEFORE UPDATE ON usage FOR EACH ROW EXECUTE FUNCTION refuse('usage is append-only');

CREATE FUNCTION keep_usage() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.day >= coalesce((SELECT CAST(value AS BIGINT) FROM facts WHERE name = 'usage_kept_from_day'), 0) THEN
        RAISE EXCEPTION 'usage is kept until its day is over' USING ERRCODE = 'check_violation';
    END IF;
    RETURN OLD;
END $$;

CREATE TRIGGER usage_stays BEFORE DELETE ON usage FOR EACH ROW EXECUTE FUNCTION keep_usage();
CREATE TRIGGER usage_days_stay BEFORE DELETE ON usage_days FOR EACH ROW EXECUTE FUNCTION refuse('sums of usage are kept');

-- -- prices

CREATE TABLE prices (
    price_id BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    model TEXT NOT NULL,
    account_id TEXT REFERENCES accounts,
    price BIGINT NOT NULL CHECK (price BETWEEN 0 AND 1000000000000000),
    from_ms BIGINT NOT NULL,
    to_ms BIGINT CHECK (to_ms >= from_ms),
    created_ms BIGINT NOT NULL
);
CREATE UNIQUE INDEX prices_one_at_a_time ON prices (model, coalesce(account_id, '')) WHERE to_ms IS NULL;
CREATE INDEX prices_of_model ON prices (model, account_id, from_ms);

CREATE TRIGGER prices_only_end BEFORE UPDATE ON prices FOR EACH ROW
WHEN (NEW.to_ms > OLD.to_ms OR NEW.to_ms IS NULL OR OLD.price_id <> NEW.price_id OR OLD.model <> NEW.model
    OR OLD.account_id IS DISTINCT FROM NEW.account_id OR OLD.price <> NEW.price OR OLD.from_ms <> NEW.from_ms)
EXECUTE FUNCTION refuse('a price only ends');
CREATE TRIGGER prices_stay BEFORE DELETE ON prices FOR EACH ROW EXECUTE FUNCTION refuse('prices are kept');
CREATE TRIGGER prices_changed AFTER INSERT OR UPDATE ON prices EXECUTE FUNCTION note_change('prices');

-- -- leases

CREATE TABLE leases (
    key_id TEXT NOT NULL,
    minute BIGINT NOT NULL,
    requests BIGINT NOT NULL,
    tokens BIGINT NOT NULL,
    PRIMARY KEY (key_id, minute)
);
CREATE INDEX leases_by_minute ON leases (minute);

-- -- claims

CREATE TABLE claims (
    account_id TEXT NOT NULL REFERENCES accounts,
    key_hash BYTEA NOT NULL CHECK (length(key_hash) = 32),
    body_hash BYTEA NOT NULL CHECK (length(body_hash) = 32),
    hold_id TEXT NOT NULL UNIQUE,
    created_ms BIGINT NOT NULL,
    reply BYTEA,
    PRIMARY KEY (account_id, key_hash)
);
ALTER TABLE claims ALTER COLUMN reply SET STORAGE EXTERNAL;  -- replies are encrypted: compressing would gain nothing
CREATE INDEX claims_by_age ON claims (created_ms);

CREATE TABLE kept_replies (
    account_id TEXT PRIMARY KEY REFERENCES accounts,
    bytes BIGINT NOT NULL CHECK (bytes >= 0)
);

CREATE FUNCTION count_replies() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    added BIGINT := coalesce(CASE TG_OP WHEN 'UPDATE' THEN length(NEW.reply) END, 0) - coalesce(length(OLD.reply), 0);
BEGIN
    INSERT INTO kept_replies (account_id, bytes) VALUES (OLD.account_id, greatest(added, 0))
    ON CONFLICT (account_id) DO UPDATE SET bytes = kept_replies.bytes + added;
    RETURN NULL;
END $$;

CREATE TRIGGER claims_count AFTER UPDATE OF reply ON claims FOR EACH ROW EXECUTE FUNCTION count_replies();
CREATE TRIGGER claims_count_down AFTER DELETE ON claims FOR EACH ROW
WHEN (OLD.reply IS NOT NULL) EXECUTE FUNCTION count_replies();

-- -- nodes

CREATE TABLE nodes (
    node_id TEXT PRIMARY KEY,
    small_id BIGINT NOT NULL UNIQUE,
    kind TEXT NOT NULL CHECK (kind IN ('own', 'upstream')),
    standing TEXT NOT NULL CHECK (standing IN ('pending', 'admitted', 'removed')),
    public_key BYTEA UNIQUE CHECK (public_key IS NULL OR length(public_key) = 32),
    address TEXT NOT NULL,
    ip TEXT NOT NULL,
    certificate BYTEA NOT NULL,
    country TEXT NOT NULL,
    offers TEXT NOT NULL,
    inputs_max BIGINT NOT NULL CHECK (inputs_max > 0),
    in_flight_max BIGINT NOT NULL CHECK (in_flight_max > 0),
    sealed BYTEA NOT NULL,
    trusted SMALLINT NOT NULL DEFAULT 0,
    weight DOUBLE PRECISION NOT NULL DEFAULT 1.0 CHECK (weight >= 0),
    draining SMALLINT NOT NULL DEFAULT 0,
    quarantined TEXT NOT NULL DEFAULT '',
    receipts_count BIGINT NOT NULL DEFAULT 0,
    receipts_head BYTEA NOT NULL CHECK (length(receipts_head) = 32),
    created_ms BIGINT NOT NULL,
    registered_ms BIGINT NOT NULL,
    CHECK ((kind = 'own') = (public_key IS NOT NULL))
);

CREATE TRIGGER nodes_stay BEFORE DELETE ON nodes FOR EACH ROW WHEN (OLD.standing <> 'pending')
EXECUTE FUNCTION refuse('nodes that were admitted are kept, for their receipts and payables');

CREATE TRIGGER nodes_changed AFTER INSERT OR DELETE OR UPDATE OF standing, address, ip, certificate, offers, sealed, trusted,
    weight, draining, quarantined, in_flight_max, inputs_max ON nodes EXECUTE FUNCTION note_change('nodes');

CREATE TABLE invites (
    invite_id TEXT PRIMARY KEY,
    sealed BYTEA NOT NULL,
    note TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    used_ms BIGINT,
    node_id TEXT,
    CHECK ((used_ms IS NULL) = (node_id IS NULL))
);
