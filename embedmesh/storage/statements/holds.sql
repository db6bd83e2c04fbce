-- name: place_hold
-- Set money aside, only if the account's available balance covers it; no row is written otherwise.
INSERT INTO holds (hold_id, account_id, amount, owner, created_ms, deadline_ms)
SELECT :hold_id, account_id, :amount, :owner, :now_ms, :deadline_ms
FROM accounts
WHERE account_id = :account_id AND kind = 'customer' AND balance - held >= :amount;

-- name: capture_hold
-- End an open hold by capturing part or all of it.
UPDATE holds SET state = 'captured', ended_by = 'capture', captured = :cost, ended_ms = :now_ms
WHERE hold_id = :hold_id AND state = 'open';

-- name: release_hold
-- End an open hold without charging.
UPDATE holds SET state = 'released', ended_by = :ended_by, ended_ms = :now_ms
WHERE hold_id = :hold_id AND state = 'open';

-- name: expire_holds
-- Release holds past their deadline, the oldest first, at most as many as one batch should carry.
UPDATE holds SET state = 'released', ended_by = 'expire', ended_ms = :now_ms
WHERE hold_id IN (
    SELECT hold_id FROM holds WHERE state = 'open' AND deadline_ms < :now_ms ORDER BY deadline_ms LIMIT :holds_max
);

-- name: recover_holds
-- Release every open hold: run at start, when the one owner that could have placed them is gone.
UPDATE holds SET state = 'released', ended_by = 'recover', ended_ms = :now_ms
WHERE state = 'open';

-- name: hold_state
-- Where a hold stands.
SELECT state FROM holds WHERE hold_id = :hold_id;

-- name: insert_charge
-- Move a captured hold's cost from the customer to revenue.
INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)
VALUES ('charge', :account_id, 'revenue', :amount, :hold_id, :now_ms);

-- name: insert_payable
-- Move a node's share of a captured hold's cost from revenue to the node.
INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)
VALUES ('payable', 'revenue', :account_id, :amount, :hold_id, :now_ms);

-- name: insert_usage
-- Record what a captured hold was for.
INSERT INTO usage (hold_id, account_id, key_id, model, node_id, tokens, cost, payable, user_hash, day)
VALUES (:hold_id, :account_id, :key_id, :model, :node_id, :tokens, :cost, :payable, :user_hash, :day);
