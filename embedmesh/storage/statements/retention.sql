-- name: old_usage
-- Whether any usage is older than it is kept.
SELECT 1 FROM usage WHERE hold_id < :before_id AND day < :day LIMIT 1;

-- name: forget_usage
-- Usage records of days before one, at most as many as one batch should carry. Their sums stay. They are found by
-- their ids, which begin with the time: a request is charged after it began.
DELETE FROM usage WHERE hold_id IN (
    SELECT hold_id FROM usage WHERE hold_id < :before_id AND day < :day ORDER BY hold_id LIMIT :rows_max
);
