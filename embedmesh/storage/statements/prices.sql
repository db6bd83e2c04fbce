-- name: current_prices
-- All prices that hold at a moment: of a meter of a model, for one account or for all. The latest that has begun counts.
SELECT model, meter, account_id, price, price_id FROM prices
WHERE from_ms <= CAST(:now_ms AS BIGINT) AND (to_ms IS NULL OR to_ms > CAST(:now_ms AS BIGINT))
ORDER BY from_ms, price_id;

-- name: price_at
-- What a meter of a model costs at a moment, by the prices that were set for one account, or for all.
SELECT price FROM prices
WHERE model = :model AND meter = :meter AND account_id IS NOT DISTINCT FROM CAST(:account_id AS TEXT)
    AND from_ms <= CAST(:from_ms AS BIGINT) AND (to_ms IS NULL OR to_ms > CAST(:from_ms AS BIGINT))
ORDER BY from_ms DESC, price_id DESC LIMIT 1;

-- name: end_price
-- End the price that holds at a moment then; prices that were to begin later never begin.
UPDATE prices SET to_ms = CASE WHEN from_ms > CAST(:from_ms AS BIGINT) THEN from_ms ELSE CAST(:from_ms AS BIGINT) END
WHERE model = :model AND meter = :meter AND account_id IS NOT DISTINCT FROM CAST(:account_id AS TEXT)
    AND (to_ms IS NULL OR (to_ms > CAST(:from_ms AS BIGINT) AND to_ms > from_ms));

-- name: insert_price
-- A price from a moment on.
INSERT INTO prices (model, meter, account_id, price, from_ms, created_ms)
VALUES (:model, :meter, :account_id, :price, :from_ms, :now_ms)
RETURNING price_id;

-- name: list_prices
-- Prices of all times, of one model or of all, the latest first, from one on.
SELECT price_id, model, account_id, price, from_ms, to_ms, meter FROM prices
WHERE (CAST(:model AS TEXT) IS NULL OR model = :model) AND (CAST(:after AS BIGINT) = 0
    OR (from_ms, price_id) < (SELECT last.from_ms, last.price_id FROM prices AS last WHERE last.price_id = :after))
ORDER BY from_ms DESC, price_id DESC LIMIT :rows_max;
