-- name: last_block
-- Where the chain ends.
SELECT last_transfer, hash FROM blocks ORDER BY last_transfer DESC LIMIT 1;

-- name: unchained
-- Transfers that no block covers yet, in their order.
SELECT
    transfer_id, kind, source_id, target_id, amount, hold_id, reference, created_ms, tab_id, settlement, requests, digest
FROM transfers
WHERE transfer_id > :last_transfer ORDER BY transfer_id LIMIT :rows_max;

-- name: insert_block
-- Cover them.
INSERT INTO blocks (last_transfer, transfers, hash, created_ms, acts)
VALUES (:last_transfer, :transfers, :hash, :now_ms, :acts);

-- name: find_head
-- A block by its hash: how the chain ended once.
SELECT last_transfer FROM blocks WHERE hash = :hash LIMIT 1;

-- name: all_blocks
-- The whole chain, from its beginning.
SELECT last_transfer, transfers, hash, acts FROM blocks ORDER BY last_transfer;
