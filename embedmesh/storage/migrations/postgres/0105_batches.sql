-- Runs before the new code. Adds files and batches, with the same tables as SQLite's script: see there for what each is for.

-- -- files

CREATE TABLE files (
    file_id TEXT COLLATE "C" PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL CHECK (purpose IN ('batch', 'batch_output')),
    bytes BIGINT NOT NULL CHECK (bytes >= 0),
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    deleted_ms BIGINT
);
-- With all that is added up, so that no row is looked at.
CREATE INDEX files_of_account ON files (account_id, file_id, bytes, purpose);
CREATE INDEX files_by_end ON files (expires_ms);
CREATE INDEX files_deleted ON files (deleted_ms) WHERE deleted_ms IS NOT NULL;

CREATE TRIGGER files_keep_their_terms
BEFORE UPDATE OF file_id, account_id, filename, purpose, bytes, created_ms, expires_ms ON files FOR EACH ROW
EXECUTE FUNCTION refuse('a file keeps its terms');

CREATE TRIGGER files_are_deleted_once BEFORE UPDATE OF deleted_ms ON files FOR EACH ROW
WHEN (OLD.deleted_ms IS NOT NULL) EXECUTE FUNCTION refuse('a file is deleted once');

-- -- batches

CREATE TABLE batches (
    batch_id TEXT COLLATE "C" PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL REFERENCES keys,
    state TEXT NOT NULL DEFAULT 'validating' CHECK (state IN (
        'validating', 'in_progress', 'finalizing', 'cancelling', 'completed', 'failed', 'expired', 'cancelled'
    )),
    endpoint TEXT NOT NULL,
    model TEXT,
    input_file_id TEXT NOT NULL,
    output_file_id TEXT,
    error_file_id TEXT,
    window_s BIGINT NOT NULL,
    output_expires_s BIGINT NOT NULL,
    metadata TEXT,
    errors TEXT,
    prices TEXT,
    amount BIGINT NOT NULL DEFAULT 0,
    output_bytes BIGINT NOT NULL DEFAULT 0 CHECK (output_bytes >= 0),
    units BIGINT NOT NULL DEFAULT 0,
    total BIGINT NOT NULL DEFAULT 0,
    completed BIGINT NOT NULL DEFAULT 0,
    failed BIGINT NOT NULL DEFAULT 0,
    charged BIGINT NOT NULL DEFAULT 0,
    cost BIGINT NOT NULL DEFAULT 0 CHECK (cost BETWEEN 0 AND amount),
    input_tokens BIGINT NOT NULL DEFAULT 0,
    cached_tokens BIGINT NOT NULL DEFAULT 0,
    output_tokens BIGINT NOT NULL DEFAULT 0,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    in_progress_ms BIGINT,
    finalizing_ms BIGINT,
    completed_ms BIGINT,
    failed_ms BIGINT,
    expired_ms BIGINT,
    cancelling_ms BIGINT,
    cancelled_ms BIGINT,
    ended_ms BIGINT,
    swept SMALLINT NOT NULL DEFAULT 0 CHECK (swept IN (0, 1)),
    owner TEXT,
    lease_ms BIGINT NOT NULL DEFAULT 0,
    epoch BIGINT NOT NULL DEFAULT 0,
    CHECK ((state IN ('completed', 'failed', 'expired', 'cancelled')) = (ended_ms IS NOT NULL)),
    CHECK (completed >= 0 AND failed >= 0 AND completed + failed <= total)
) WITH (fillfactor = 60);  -- counts change with each unit, leases every few seconds
CREATE INDEX batches_of_account ON batches (account_id, batch_id);
CREATE INDEX batches_open ON batches (account_id) WHERE ended_ms IS NULL;
CREATE INDEX batches_reading ON batches (input_file_id) WHERE ended_ms IS NULL;
CREATE INDEX batches_unswept ON batches (ended_ms) WHERE ended_ms IS NOT NULL AND swept = 0;
CREATE INDEX batches_ended ON batches (ended_ms) WHERE ended_ms IS NOT NULL;

CREATE TRIGGER batches_start_validating BEFORE INSERT ON batches FOR EACH ROW
WHEN (NEW.state <> 'validating' OR NEW.epoch <> 0) EXECUTE FUNCTION refuse('a batch starts validating');

CREATE TRIGGER batches_move_on BEFORE UPDATE OF state ON batches FOR EACH ROW
WHEN (NEW.state <> OLD.state AND NOT CASE OLD.state
    WHEN 'validating' THEN NEW.state IN ('in_progress', 'failed', 'cancelling', 'expired')
    WHEN 'in_progress' THEN NEW.state IN ('finalizing', 'cancelling', 'expired')
    WHEN 'finalizing' THEN NEW.state = 'completed'
    WHEN 'cancelling' THEN NEW.state = 'cancelled'
    ELSE FALSE
END)
EXECUTE FUNCTION refuse('a batch only moves on');

CREATE FUNCTION batch_has_its_money() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state = 'in_progress' AND OLD.state <> 'in_progress' AND NOT EXISTS (
        SELECT 1 FROM tabs WHERE tab_id = NEW.batch_id AND account_id = NEW.account_id AND key_id = NEW.key_id
            AND amount = NEW.amount AND ended_ms IS NULL
    ) THEN
        RAISE EXCEPTION 'a batch begins with a tab of its own over what it costs' USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.ended_ms IS NOT NULL AND OLD.ended_ms IS NULL AND EXISTS (
        SELECT 1 FROM tabs WHERE tab_id = NEW.batch_id AND ended_ms IS NULL
    ) THEN
        RAISE EXCEPTION 'a batch ends with its tab' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER batches_have_their_money BEFORE UPDATE OF state, ended_ms ON batches FOR EACH ROW
EXECUTE FUNCTION batch_has_its_money();

-- The last word in a batch's life: nothing changes then but that it was swept.
CREATE TRIGGER batches_end_once
BEFORE UPDATE OF
    state, output_file_id, error_file_id, completed, failed, charged, cost, input_tokens, cached_tokens, output_tokens, epoch
ON batches FOR EACH ROW
WHEN (OLD.ended_ms IS NOT NULL) EXECUTE FUNCTION refuse('a batch ends once');

CREATE TRIGGER batches_keep_their_terms
BEFORE UPDATE OF
    batch_id, account_id, key_id, endpoint, input_file_id, window_s, output_expires_s, metadata, created_ms, expires_ms
ON batches FOR EACH ROW
EXECUTE FUNCTION refuse('a batch keeps its terms');

CREATE TRIGGER batches_only_grow BEFORE UPDATE OF completed, failed, charged, cost, epoch ON batches FOR EACH ROW
WHEN (NEW.completed < OLD.completed OR NEW.failed < OLD.failed OR NEW.charged < OLD.charged OR NEW.cost < OLD.cost
    OR NEW.epoch < OLD.epoch)
EXECUTE FUNCTION refuse('what a batch has done only grows');

CREATE TRIGGER batches_stay_until_their_end BEFORE DELETE ON batches FOR EACH ROW
WHEN (OLD.ended_ms IS NULL AND (OLD.state <> 'validating' OR OLD.units > 0))
EXECUTE FUNCTION refuse('a batch is kept until its end');

-- -- batch_units

CREATE TABLE batch_units (
    batch_id TEXT COLLATE "C" NOT NULL REFERENCES batches,
    unit BIGINT NOT NULL CHECK (unit >= 0),
    first_byte BIGINT NOT NULL CHECK (first_byte >= 0),
    bytes BIGINT NOT NULL CHECK (bytes > 0),
    first_line BIGINT NOT NULL CHECK (first_line >= 0),
    lines BIGINT NOT NULL CHECK (lines > 0),
    tokens BIGINT NOT NULL CHECK (tokens >= 0),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'done')),
    segment TEXT,
    output_bytes BIGINT CHECK (output_bytes >= 0),
    error_bytes BIGINT CHECK (error_bytes >= 0),
    completed BIGINT NOT NULL DEFAULT 0,
    failed BIGINT NOT NULL DEFAULT 0,
    charged BIGINT NOT NULL DEFAULT 0 CHECK (charged BETWEEN 0 AND completed),
    cost BIGINT NOT NULL DEFAULT 0 CHECK (cost >= 0),
    PRIMARY KEY (batch_id, unit),
    CHECK (completed + failed = CASE state WHEN 'done' THEN lines ELSE 0 END),
    CHECK ((state = 'done') = (segment IS NOT NULL AND output_bytes IS NOT NULL AND error_bytes IS NOT NULL))
);
CREATE INDEX batch_units_open ON batch_units (batch_id, unit) WHERE state = 'open';

CREATE FUNCTION start_unit_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state <> 'open' OR NOT EXISTS (
        SELECT 1 FROM batches WHERE batch_id = NEW.batch_id AND state = 'validating'
    ) THEN
        RAISE EXCEPTION 'a unit starts open, before its batch is in progress' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER batch_units_start_open BEFORE INSERT ON batch_units FOR EACH ROW EXECUTE FUNCTION start_unit_open();

CREATE TRIGGER batch_units_are_done_once BEFORE UPDATE ON batch_units FOR EACH ROW
WHEN (OLD.state <> 'open' OR NEW.state <> 'done' OR NEW.batch_id <> OLD.batch_id OR NEW.unit <> OLD.unit
    OR NEW.first_byte <> OLD.first_byte OR NEW.bytes <> OLD.bytes OR NEW.first_line <> OLD.first_line
    OR NEW.lines <> OLD.lines OR NEW.tokens <> OLD.tokens)
EXECUTE FUNCTION refuse('a unit is done once, and keeps its terms');

CREATE FUNCTION keep_unit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM batches WHERE batch_id = OLD.batch_id AND ended_ms IS NULL AND state <> 'validating') THEN
        RAISE EXCEPTION 'units are kept until their batch has ended' USING ERRCODE = 'check_violation';
    END IF;
    RETURN OLD;
END $$;

CREATE TRIGGER batch_units_stay_while_they_are_worked_off BEFORE DELETE ON batch_units FOR EACH ROW
EXECUTE FUNCTION keep_unit();

-- -- tabs: one over nothing is that of a batch whose model is free

ALTER TABLE tabs DROP CONSTRAINT tabs_amount_check;
ALTER TABLE tabs ADD CONSTRAINT tabs_amount_check
CHECK (amount BETWEEN 0 AND 4611686018427387904 AND (amount > 0 OR owner = tab_id));

CREATE TRIGGER batches_stay_all BEFORE TRUNCATE ON batches EXECUTE FUNCTION refuse('a batch is kept until its end');
CREATE TRIGGER batch_units_stay_all BEFORE TRUNCATE ON batch_units
EXECUTE FUNCTION refuse('units are kept until their batch has ended');
