-- name: insert_account
-- Make an account, if there is none of that id.
INSERT INTO accounts (account_id, kind, created_ms) VALUES (:account_id, :kind, :now_ms) ON CONFLICT DO NOTHING;

-- name: find_account
-- One account.
SELECT account_id, kind, balance, held, created_ms FROM accounts WHERE account_id = :account_id;

-- name: list_accounts
-- All accounts, oldest first.
SELECT account_id, kind, balance, held, created_ms FROM accounts ORDER BY created_ms, account_id;

-- name: insert_credit
-- Move money between the credit source and a customer, under an outside reference that applies once.
INSERT INTO transfers (kind, source_id, target_id, amount, reference, created_ms)
VALUES ('credit', :source_id, :target_id, :amount, :reference, :now_ms);

-- name: find_credit
-- The credit that was applied under a reference.
SELECT source_id, target_id, amount FROM transfers WHERE reference = :reference;
