-- name: count_jobs
-- How many jobs of an account have not ended, and how many it has made since a day ago.
SELECT
    (SELECT count(*) FROM jobs JOIN tabs ON tab_id = job_id
        WHERE jobs.account_id = :account_id AND swept = 0 AND ended_ms IS NULL),
    (SELECT count(*) FROM jobs WHERE account_id = :account_id AND job_id > :since_id);

-- name: open_job_tab
-- Set the budget of a job aside. Nothing where the account does not cover it, or a budget.
INSERT INTO tabs (tab_id, account_id, key_id, owner, amount, opened_ms, deadline_ms)
SELECT
    CAST(:job_id AS TEXT), account_id, key_id, CAST(:job_id AS TEXT), CAST(:amount AS BIGINT), CAST(:now_ms AS BIGINT),
    CAST(:now_ms AS BIGINT) + CAST(:lasts_ms AS BIGINT) + CAST(:grace_ms AS BIGINT)
FROM keys WHERE key_id = :key_id AND account_id = :account_id
RETURNING tab_id;

-- name: create_job
-- The job whose money was set aside just now.
INSERT INTO jobs (job_id, account_id, key_id, name, texts_total, created_ms, expires_ms)
SELECT
    tab_id, account_id, key_id, CAST(:name AS TEXT), CAST(:texts_total AS BIGINT), opened_ms,
    opened_ms + CAST(:lasts_ms AS BIGINT)
FROM tabs WHERE tab_id = :job_id;

-- name: find_job
-- One job of an account. The last number is of texts since a moment.
SELECT
    job_id, jobs.account_id, jobs.key_id, name, texts_total, created_ms, expires_ms, closed_ms, state, ended_ms, amount,
    captured, requests, texts, tokens, recomputed_tokens,
    (SELECT CAST(coalesce(sum(done.texts), 0) AS BIGINT) FROM job_requests AS done
        WHERE done.job_id = jobs.job_id AND done_ms > CAST(:since_ms AS BIGINT))
FROM jobs JOIN tabs ON tab_id = job_id WHERE job_id = :job_id AND jobs.account_id = :account_id;

-- name: jobs_before
-- Jobs of an account in the order of their ids, the last first, those before one.
SELECT
    job_id, jobs.account_id, jobs.key_id, name, texts_total, created_ms, expires_ms, closed_ms, state, ended_ms, amount,
    captured, requests, texts, tokens, recomputed_tokens,
    (SELECT CAST(coalesce(sum(done.texts), 0) AS BIGINT) FROM job_requests AS done
        WHERE done.job_id = jobs.job_id AND done_ms > CAST(:since_ms AS BIGINT))
FROM jobs JOIN tabs ON tab_id = job_id
WHERE jobs.account_id = :account_id AND job_id < :after ORDER BY job_id DESC LIMIT :rows_max;

-- name: job_of_request
-- What a request of a job meets: whose job it is, whether it may still begin, how much is charged and under way, and how
-- much was computed again.
SELECT
    jobs.account_id, jobs.key_id, tabs.state, expires_ms, amount, captured,
    (SELECT CAST(coalesce(sum(open.amount), 0) AS BIGINT) FROM job_requests AS open
        WHERE open.job_id = :job_id AND open.done_ms IS NULL),
    requests, tokens, recomputed_tokens
FROM jobs JOIN tabs ON tab_id = jobs.job_id WHERE jobs.job_id = :job_id;

-- name: find_request
-- Who has a key of a job: the hash of its body, by which attempt, until when, and whether it is done.
SELECT body_hash, attempt, deadline_ms, done_ms FROM job_requests WHERE job_id = :job_id AND key_hash = :key_hash;

-- name: begin_request
-- A request of a job is under way: its money is set aside.
INSERT INTO job_requests (
    job_id, key_hash, body_hash, request_id, attempt, owner, amount, texts, tokens, deadline_ms
) VALUES (
    :job_id, :key_hash, :body_hash, :request_id, :attempt, :owner, :amount, :texts, :tokens, :deadline_ms
);

-- name: finish_request
-- It was delivered, by the attempt that has the key, while the job has its money.
UPDATE job_requests SET done_ms = CAST(:now_ms AS BIGINT), amount = CAST(:cost AS BIGINT), tokens = CAST(:tokens AS BIGINT)
WHERE job_id = :job_id AND key_hash = :key_hash AND attempt = :attempt AND done_ms IS NULL
    AND EXISTS (SELECT 1 FROM tabs WHERE tab_id = :job_id AND ended_ms IS NULL)
RETURNING texts;

-- name: count_request
-- What it came to is added to its job.
UPDATE jobs SET texts = texts + CAST(:texts AS BIGINT), tokens = tokens + CAST(:tokens AS BIGINT) WHERE job_id = :job_id;

-- name: count_recomputed
-- Tokens that were charged before are computed again; fewer, where that came to nothing.
UPDATE jobs SET recomputed_tokens = CASE
    WHEN recomputed_tokens + CAST(:tokens AS BIGINT) > 0 THEN recomputed_tokens + CAST(:tokens AS BIGINT) ELSE 0
END
WHERE job_id = :job_id;

-- name: drop_requests
-- Some attempts are over, and nothing was delivered: their keys are free again.
DELETE FROM job_requests
WHERE done_ms IS NULL AND attempt IN (SELECT value ->> 1 FROM jsonb_each(:rows))
RETURNING amount;

-- name: overdue_requests
-- Attempts past their deadline, the oldest first.
SELECT job_requests.job_id, attempt, account_id FROM job_requests JOIN jobs ON jobs.job_id = job_requests.job_id
WHERE done_ms IS NULL AND deadline_ms < CAST(:now_ms AS BIGINT) ORDER BY deadline_ms LIMIT :rows_max;

-- name: open_requests
-- The attempts of one gateway, or of all. Read at its start, when the process that made them is gone.
SELECT job_requests.job_id, attempt, account_id FROM job_requests JOIN jobs ON jobs.job_id = job_requests.job_id
WHERE done_ms IS NULL AND (CAST(:owner AS TEXT) IS NULL OR owner = :owner);

-- name: close_job
-- The account wants no more of a job that is not over.
UPDATE jobs SET closed_ms = CAST(:now_ms AS BIGINT)
WHERE job_id = :job_id AND account_id = :account_id AND closed_ms IS NULL
    AND EXISTS (SELECT 1 FROM tabs WHERE tab_id = :job_id AND ended_ms IS NULL);

-- name: close_job_tab
-- Its money is for what is under way, and for nothing more.
UPDATE tabs SET state = 'closing' WHERE tab_id = :job_id AND account_id = :account_id AND owner = tab_id AND state = 'open';

-- name: closed_jobs
-- Those of some jobs that are closed and have nothing under way: their tabs end.
SELECT tab_id FROM tabs
WHERE tab_id IN (SELECT value ->> 0 FROM jsonb_each(:rows)) AND state = 'closing'
    AND NOT EXISTS (SELECT 1 FROM job_requests WHERE job_id = tab_id AND done_ms IS NULL);

-- name: unswept_jobs
-- Jobs that are over and whose requests were not deleted yet.
SELECT job_id FROM jobs JOIN tabs ON tab_id = job_id WHERE swept = 0 AND ended_ms IS NOT NULL LIMIT :rows_max;

-- name: forget_requests
-- Delete requests of a job that is over, at most as many as one batch should carry.
DELETE FROM job_requests WHERE job_id = :job_id AND key_hash IN (
    SELECT key_hash FROM job_requests WHERE job_id = :job_id LIMIT :rows_max
);

-- name: sweep_job
-- The requests of a job were deleted.
UPDATE jobs SET swept = 1 WHERE job_id = :job_id AND NOT EXISTS (SELECT 1 FROM job_requests WHERE job_id = :job_id);

-- name: forget_jobs
-- Delete jobs that ended long ago, at most as many as one batch should carry.
DELETE FROM jobs WHERE job_id IN (
    SELECT job_id FROM jobs WHERE expires_ms < CAST(:kept_from_ms AS BIGINT) AND swept = 1 LIMIT :rows_max
);
