-- Runs before the new code. Adds prices of searches, as SQLite's script does: see there for what they are.

ALTER TABLE prices DROP CONSTRAINT prices_meter_check,
ADD CONSTRAINT prices_meter_check CHECK (
    meter IN ('input', 'cached', 'output', 'searches') OR meter LIKE 'images:_%'
);
