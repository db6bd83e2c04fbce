-- name: insert_account
-- Make an account, if there is none of that id.
INSERT INTO accounts (account_id, kind, cache, created_ms) VALUES (:account_id, :kind, :cache, :now_ms)
ON CONFLICT DO NOTHING;

-- name: find_account
-- One account.
SELECT account_id, kind, balance, held, created_ms, credit_limit, cache FROM accounts WHERE account_id = :account_id;

-- name: list_accounts
-- Accounts, oldest first, from one on.
SELECT account_id, kind, balance, held, created_ms, credit_limit, cache FROM accounts
WHERE (created_ms, account_id) > (CAST(:after_ms AS BIGINT), CAST(:after_id AS TEXT))
ORDER BY created_ms, account_id LIMIT :rows_max;

-- name: set_credit_limit
-- How much a customer may owe; nothing is changed where it owes more already.
UPDATE accounts SET credit_limit = :credit_limit
WHERE account_id = :account_id AND kind = 'customer' AND balance + CAST(:credit_limit AS BIGINT) >= held;

-- name: set_cache
-- Whether a customer's answers may come from the cache, and what they cost then.
UPDATE accounts SET cache = :cache WHERE account_id = :account_id;

-- name: insert_referenced
-- Move money under an outside reference that applies once: a credit, a refund, a payout.
INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, reference, created_ms, tab_id)
VALUES (:kind, :source_id, :target_id, :amount, :hold_id, :reference, :now_ms, :tab_id);

-- name: find_reference
-- What was applied under a reference.
SELECT kind, source_id, target_id, amount, hold_id FROM transfers WHERE reference = :reference;
