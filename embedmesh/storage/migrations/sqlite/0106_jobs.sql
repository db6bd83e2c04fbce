-- Runs before the new code. Adds jobs: budgets that requests with an Idempotency-Key are charged from, each key once.
-- See `0100_start.sql` for units, and for what each of the older tables is.

-- -- jobs: the money of a job is that of the tab with its own id, which is its own owner: no gateway's. `texts` and `tokens`
-- are those of its charged requests. `closed_ms`: its account wants no more of it; its tab ends once nothing is under way.
-- `swept`: its requests were deleted, after its end

CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY REFERENCES tabs,
    account_id TEXT NOT NULL REFERENCES accounts,
    key_id TEXT NOT NULL REFERENCES keys,
    name TEXT,
    texts_total INTEGER CHECK (texts_total > 0),
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    closed_ms INTEGER,
    texts INTEGER NOT NULL DEFAULT 0,
    tokens INTEGER NOT NULL DEFAULT 0,
    recomputed_tokens INTEGER NOT NULL DEFAULT 0 CHECK (recomputed_tokens >= 0),
    swept INTEGER NOT NULL DEFAULT 0 CHECK (swept IN (0, 1))
) STRICT, WITHOUT ROWID;
CREATE INDEX jobs_of_account ON jobs (account_id, job_id);
CREATE INDEX jobs_unswept ON jobs (job_id) WHERE swept = 0;
CREATE INDEX jobs_by_end ON jobs (expires_ms);

CREATE TRIGGER jobs_start_with_their_money BEFORE INSERT ON jobs WHEN NOT EXISTS (
    SELECT 1 FROM tabs WHERE tab_id = NEW.job_id AND owner = NEW.job_id AND account_id = NEW.account_id
        AND key_id = NEW.key_id AND state = 'open'
)
BEGIN SELECT RAISE(ABORT, 'a job starts with a tab of its own'); END;

CREATE TRIGGER jobs_keep_their_terms
BEFORE UPDATE OF job_id, account_id, key_id, name, texts_total, created_ms, expires_ms ON jobs
BEGIN SELECT RAISE(ABORT, 'a job keeps its terms'); END;

CREATE TRIGGER jobs_only_grow BEFORE UPDATE OF texts, tokens ON jobs
WHEN NEW.texts < OLD.texts OR NEW.tokens < OLD.tokens
BEGIN SELECT RAISE(ABORT, 'what a job has done only grows'); END;

CREATE TRIGGER jobs_stay_until_they_are_swept BEFORE DELETE ON jobs WHEN OLD.swept = 0
BEGIN SELECT RAISE(ABORT, 'a job is kept until its requests were deleted'); END;

-- -- job_requests: what has an Idempotency-Key of a job. Under way until `done_ms`: then `amount` is set aside of the job's
-- money, until `deadline_ms`, by the `attempt` that the gateway `owner` makes. Done: `amount` is what was charged, as the usage
-- record `request_id`

CREATE TABLE job_requests (
    job_id TEXT NOT NULL REFERENCES jobs,
    key_hash BLOB NOT NULL CHECK (length(key_hash) = 32),
    body_hash BLOB NOT NULL CHECK (length(body_hash) = 32),
    request_id TEXT NOT NULL,
    attempt TEXT NOT NULL,
    owner TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount >= 0),
    texts INTEGER NOT NULL CHECK (texts > 0),
    tokens INTEGER NOT NULL CHECK (tokens >= 0),
    deadline_ms INTEGER NOT NULL,
    done_ms INTEGER,
    PRIMARY KEY (job_id, key_hash)
) STRICT, WITHOUT ROWID;
-- With all that is added up: of those under way, and of those that were done lately.
CREATE INDEX job_requests_by_end ON job_requests (job_id, done_ms, amount, texts);
CREATE INDEX job_requests_open ON job_requests (attempt) WHERE done_ms IS NULL;
CREATE INDEX job_requests_by_deadline ON job_requests (deadline_ms) WHERE done_ms IS NULL;

CREATE TRIGGER job_requests_start_open BEFORE INSERT ON job_requests WHEN NEW.done_ms IS NOT NULL OR NOT EXISTS (
    SELECT 1 FROM tabs WHERE tab_id = NEW.job_id AND state = 'open'
)
BEGIN SELECT RAISE(ABORT, 'a request of a job starts under way, while the job is open'); END;

CREATE TRIGGER job_requests_are_done_once BEFORE UPDATE ON job_requests
WHEN OLD.done_ms IS NOT NULL OR NEW.done_ms IS NULL OR NEW.amount > OLD.amount OR NEW.job_id <> OLD.job_id
    OR NEW.key_hash <> OLD.key_hash OR NEW.body_hash <> OLD.body_hash OR NEW.request_id <> OLD.request_id
    OR NEW.attempt <> OLD.attempt
BEGIN SELECT RAISE(ABORT, 'a request of a job is done once, and keeps its terms'); END;

CREATE TRIGGER job_requests_stay_as_long_as_their_job BEFORE DELETE ON job_requests
WHEN OLD.done_ms IS NOT NULL AND EXISTS (SELECT 1 FROM tabs WHERE tab_id = OLD.job_id AND ended_ms IS NULL)
BEGIN SELECT RAISE(ABORT, 'what a job has done is known as long as the job'); END;
