-- name: old_usage
-- Whether any usage is older than it is kept.
SELECT 1 FROM usage WHERE day < :day LIMIT 1;

-- name: forget_usage
-- Usage records of days before one, at most as many as one batch should carry. Their sums stay.
DELETE FROM usage WHERE hold_id IN (SELECT hold_id FROM usage WHERE day < :day LIMIT :rows_max);
