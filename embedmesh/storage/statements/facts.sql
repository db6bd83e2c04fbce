-- name: find_fact
-- One fact about this store.
SELECT value FROM facts WHERE name = :name;

-- name: insert_fact
-- Note a fact about this store, unless it is noted already.
INSERT INTO facts (name, value) VALUES (:name, :value) ON CONFLICT DO NOTHING;

-- name: set_fact
-- Note a fact about this store, in place of an older value.
INSERT INTO facts (name, value) VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value;

-- name: delete_fact
-- Forget a fact about this store.
DELETE FROM facts WHERE name = :name;

-- name: write_probe
-- Write something that means nothing, to learn whether the store can be written at all.
INSERT INTO facts (name, value) VALUES ('probed_ms', CAST(:now_ms AS TEXT))
ON CONFLICT (name) DO UPDATE SET value = excluded.value;

-- name: all_changes
-- How often each kind of record has changed.
SELECT kind, version FROM changes;

-- name: tell_change
-- Raise the version of a kind of record that has no trigger of its own.
INSERT INTO changes (kind, version) VALUES (:kind, 1) ON CONFLICT (kind) DO UPDATE SET version = changes.version + 1;
