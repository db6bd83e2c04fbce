-- name: quick_check
-- What SQLite finds damaged in the file without comparing indexes to their tables; a row of `ok` when nothing.
PRAGMA quick_check;

-- name: list_recovered
-- The latest holds that were open when their gateway died: a reply may have been delivered and was not charged.
SELECT hold_id, account_id, amount, ended_ms FROM holds WHERE ended_by = 'recover' ORDER BY hold_id DESC LIMIT :rows_max;

-- name: count_tallies
-- How much there is.
SELECT
    (SELECT count(*) FROM accounts) AS accounts,
    (SELECT count(*) FROM transfers) AS transfers,
    (SELECT count(*) FROM holds WHERE state = 'open') AS holds_open,
    (SELECT count(*) FROM holds WHERE state = 'captured') AS holds_captured,
    (SELECT count(*) FROM holds WHERE state = 'released') AS holds_released,
    (SELECT count(*) FROM holds WHERE ended_by = 'recover') AS holds_recovered;
