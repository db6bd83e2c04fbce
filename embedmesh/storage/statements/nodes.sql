-- name: list_nodes
-- All nodes, oldest first.
SELECT
    node_id, small_id, kind, standing, public_key, address, ip, certificate, country, offers, inputs_max,
    in_flight_max, sealed, trusted, weight, draining, quarantined, receipts_count, receipts_head, created_ms, registered_ms
FROM nodes ORDER BY small_id;

-- name: one_node
-- One node.
SELECT
    node_id, small_id, kind, standing, public_key, address, ip, certificate, country, offers, inputs_max,
    in_flight_max, sealed, trusted, weight, draining, quarantined, receipts_count, receipts_head, created_ms, registered_ms
FROM nodes WHERE node_id = :node_id;

-- name: lock_node
-- Keep other gateways from changing a node until this transaction ends. It changes nothing.
UPDATE nodes SET node_id = node_id WHERE node_id = :node_id;

-- name: count_pending
-- How many nodes wait for the operator's approval.
SELECT count(*) FROM nodes WHERE standing = 'pending';

-- name: forget_gone_pending
-- Make room for one more pending node: of those that stopped asking, the one that asked longest ago goes.
DELETE FROM nodes WHERE node_id = (
    SELECT node_id FROM nodes WHERE standing = 'pending' AND registered_ms < :before_ms ORDER BY registered_ms LIMIT 1
)
RETURNING node_id;

-- name: touch_node
-- A pending node still asks to join. No trigger counts that as a change.
UPDATE nodes SET registered_ms = :now_ms WHERE node_id = :node_id AND standing = 'pending';

-- name: save_node
-- Save a node; a new one gets the next small id. Only note_receipts changes how far its receipts were checked.
INSERT INTO nodes (
    node_id, small_id, kind, standing, public_key, address, ip, certificate, country, offers, inputs_max,
    in_flight_max, sealed, trusted, weight, draining, quarantined, receipts_count, receipts_head, created_ms, registered_ms
) VALUES (
    :node_id, (SELECT coalesce(max(small_id), 0) + 1 FROM nodes), :kind, :standing, :public_key, :address, :ip,
    :certificate, :country, :offers, :inputs_max, :in_flight_max, :sealed, :trusted, :weight, :draining, :quarantined,
    :receipts_count, :receipts_head, :created_ms, :registered_ms
)
ON CONFLICT (node_id) DO UPDATE SET
    standing = excluded.standing, address = excluded.address, ip = excluded.ip, certificate = excluded.certificate,
    country = excluded.country, offers = excluded.offers, inputs_max = excluded.inputs_max,
    in_flight_max = excluded.in_flight_max, sealed = excluded.sealed, trusted = excluded.trusted, weight = excluded.weight, draining = excluded.draining,
    quarantined = excluded.quarantined, registered_ms = excluded.registered_ms
RETURNING small_id;

-- name: note_receipts
-- How far a node's log of answers was checked.
UPDATE nodes SET receipts_count = :receipts_count, receipts_head = :receipts_head WHERE node_id = :node_id;

-- name: insert_invite
-- Keep what checks a join token.
INSERT INTO invites (invite_id, sealed, note, created_ms, expires_ms)
VALUES (:invite_id, :sealed, :note, :now_ms, :expires_ms);

-- name: find_invite
-- An invite that can still be used, or that this very node has used.
SELECT sealed FROM invites
WHERE invite_id = :invite_id AND (node_id = :node_id OR (used_ms IS NULL AND expires_ms > :now_ms));

-- name: use_invite
-- Use an invite up, unless another node was faster.
UPDATE invites SET used_ms = :now_ms, node_id = :node_id
WHERE invite_id = :invite_id AND used_ms IS NULL AND expires_ms > :now_ms;

-- name: revoke_invite
-- End an invite that nobody has used.
UPDATE invites SET expires_ms = :now_ms WHERE invite_id = :invite_id AND used_ms IS NULL AND expires_ms > :now_ms;

-- name: list_invites
-- All invites, newest first.
SELECT invite_id, note, created_ms, expires_ms, used_ms, node_id FROM invites ORDER BY created_ms DESC LIMIT :rows_max;
