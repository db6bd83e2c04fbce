-- Runs before the new code. Adds jobs, with the same tables as SQLite's script: see there for what each is for.

-- -- jobs

CREATE TABLE jobs (
    job_id TEXT COLLATE "C" PRIMARY KEY REFERENCES tabs,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL REFERENCES keys,
    name TEXT,
    texts_total BIGINT CHECK (texts_total > 0),
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    closed_ms BIGINT,
    texts BIGINT NOT NULL DEFAULT 0,
    tokens BIGINT NOT NULL DEFAULT 0,
    recomputed_tokens BIGINT NOT NULL DEFAULT 0 CHECK (recomputed_tokens >= 0),
    swept SMALLINT NOT NULL DEFAULT 0 CHECK (swept IN (0, 1))
) WITH (fillfactor = 60);  -- counts change with each request
CREATE INDEX jobs_of_account ON jobs (account_id, job_id);
CREATE INDEX jobs_unswept ON jobs (job_id) WHERE swept = 0;
CREATE INDEX jobs_by_end ON jobs (expires_ms);

CREATE FUNCTION start_job_with_its_money() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM tabs WHERE tab_id = NEW.job_id AND owner = NEW.job_id AND account_id = NEW.account_id
            AND key_id = NEW.key_id AND state = 'open'
    ) THEN
        RAISE EXCEPTION 'a job starts with a tab of its own' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER jobs_start_with_their_money BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION start_job_with_its_money();

CREATE TRIGGER jobs_keep_their_terms
BEFORE UPDATE OF job_id, account_id, key_id, name, texts_total, created_ms, expires_ms ON jobs FOR EACH ROW
EXECUTE FUNCTION refuse('a job keeps its terms');

CREATE TRIGGER jobs_only_grow BEFORE UPDATE OF texts, tokens ON jobs FOR EACH ROW
WHEN (NEW.texts < OLD.texts OR NEW.tokens < OLD.tokens) EXECUTE FUNCTION refuse('what a job has done only grows');

CREATE TRIGGER jobs_stay_until_they_are_swept BEFORE DELETE ON jobs FOR EACH ROW
WHEN (OLD.swept = 0) EXECUTE FUNCTION refuse('a job is kept until its requests were deleted');

-- -- job_requests

CREATE TABLE job_requests (
    job_id TEXT COLLATE "C" NOT NULL REFERENCES jobs,
    key_hash BYTEA NOT NULL CHECK (length(key_hash) = 32),
    body_hash BYTEA NOT NULL CHECK (length(body_hash) = 32),
    request_id TEXT NOT NULL,
    attempt TEXT NOT NULL,
    owner TEXT NOT NULL,
    amount BIGINT NOT NULL CHECK (amount >= 0),
    texts BIGINT NOT NULL CHECK (texts > 0),
    tokens BIGINT NOT NULL CHECK (tokens >= 0),
    deadline_ms BIGINT NOT NULL,
    done_ms BIGINT,
    PRIMARY KEY (job_id, key_hash)
);
CREATE INDEX job_requests_by_end ON job_requests (job_id, done_ms, amount, texts);
CREATE INDEX job_requests_open ON job_requests (attempt) WHERE done_ms IS NULL;
CREATE INDEX job_requests_by_deadline ON job_requests (deadline_ms) WHERE done_ms IS NULL;

CREATE FUNCTION start_job_request_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.done_ms IS NOT NULL OR NOT EXISTS (SELECT 1 FROM tabs WHERE tab_id = NEW.job_id AND state = 'open') THEN
        RAISE EXCEPTION 'a request of a job starts under way, while the job is open' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER job_requests_start_open BEFORE INSERT ON job_requests FOR EACH ROW
EXECUTE FUNCTION start_job_request_open();

CREATE TRIGGER job_requests_are_done_once BEFORE UPDATE ON job_requests FOR EACH ROW
WHEN (OLD.done_ms IS NOT NULL OR NEW.done_ms IS NULL OR NEW.amount > OLD.amount OR NEW.job_id <> OLD.job_id
    OR NEW.key_hash <> OLD.key_hash OR NEW.body_hash <> OLD.body_hash OR NEW.request_id <> OLD.request_id
    OR NEW.attempt <> OLD.attempt)
EXECUTE FUNCTION refuse('a request of a job is done once, and keeps its terms');

CREATE FUNCTION keep_job_request() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.done_ms IS NOT NULL AND EXISTS (SELECT 1 FROM tabs WHERE tab_id = OLD.job_id AND ended_ms IS NULL) THEN
        RAISE EXCEPTION 'what a job has done is known as long as the job' USING ERRCODE = 'check_violation';
    END IF;
    RETURN OLD;
END $$;

CREATE TRIGGER job_requests_stay_as_long_as_their_job BEFORE DELETE ON job_requests FOR EACH ROW
EXECUTE FUNCTION keep_job_request();

CREATE TRIGGER jobs_stay_all BEFORE TRUNCATE ON jobs EXECUTE FUNCTION refuse('a job is kept until its requests were deleted');
CREATE TRIGGER job_requests_stay_all BEFORE TRUNCATE ON job_requests
EXECUTE FUNCTION refuse('what a job has done is known as long as the job');
