-- name: next_act
-- The number of the next act. It is taken last in a transaction, and keeps other writers from theirs until that ends.
UPDATE facts SET value = CAST(CAST(value AS BIGINT) + 1 AS TEXT) WHERE name = 'acts' RETURNING CAST(value AS BIGINT);

-- name: last_act
-- Where the audit ends.
SELECT act_id, hash FROM acts ORDER BY act_id DESC LIMIT 1;

-- name: insert_act
-- One act.
INSERT INTO acts (act_id, created_ms, actor, verb, object_id, changes, origin, request_id, hash)
VALUES (:act_id, :now_ms, :actor, :verb, :object_id, :changes, :origin, :request_id, :hash);

-- name: count_acts
-- How many acts there were.
SELECT CAST(value AS BIGINT) FROM facts WHERE name = 'acts';

-- name: find_act_hash
-- An act by its hash: how the audit ended once.
SELECT act_id FROM acts WHERE hash = :hash;

-- name: hash_of_act
-- The hash of an act.
SELECT hash FROM acts WHERE act_id = :act_id;

-- name: acts_in_order
-- All acts, from one on, in the order of the columns that are hashed.
SELECT act_id, created_ms, actor, verb, object_id, changes, origin, request_id, hash FROM acts
WHERE act_id > CAST(:after AS BIGINT) ORDER BY act_id LIMIT :rows_max;

-- name: list_acts
-- Acts of some kind, the oldest first, from one on. A verb's first word stands for all that begin with it.
SELECT act_id, created_ms, actor, verb, object_id, changes, origin, request_id, hash FROM acts
WHERE act_id > CAST(:after AS BIGINT) AND created_ms >= CAST(:since_ms AS BIGINT)
    AND (CAST(:actor AS TEXT) IS NULL OR actor = :actor)
    AND (CAST(:object_id AS TEXT) IS NULL OR object_id = :object_id)
    AND (CAST(:verb AS TEXT) IS NULL OR verb = :verb OR substr(verb, 1, length(:verb) + 1) = :verb || '.')
ORDER BY act_id LIMIT :rows_max;

-- name: list_acts_backwards
-- The same, the latest first.
SELECT act_id, created_ms, actor, verb, object_id, changes, origin, request_id, hash FROM acts
WHERE act_id < CAST(:after AS BIGINT) AND created_ms >= CAST(:since_ms AS BIGINT)
    AND (CAST(:actor AS TEXT) IS NULL OR actor = :actor)
    AND (CAST(:object_id AS TEXT) IS NULL OR object_id = :object_id)
    AND (CAST(:verb AS TEXT) IS NULL OR verb = :verb OR substr(verb, 1, length(:verb) + 1) = :verb || '.')
ORDER BY act_id DESC LIMIT :rows_max;
