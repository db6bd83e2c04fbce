-- Promises that only PostgreSQL can check; see check.sql. Its foreign keys are never switched off, and `amcheck` looks at files.

-- name: constraints_are_valid
-- Every constraint of the schema is in force.
SELECT 'constraint ' || conname, 'is not in force' FROM pg_constraint
WHERE connamespace = current_schema() :: regnamespace AND NOT convalidated;

-- name: triggers_are_on
-- Every trigger of the schema is on.
SELECT 'trigger ' || tgname, 'is off' FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
WHERE relnamespace = current_schema() :: regnamespace AND NOT tgisinternal AND tgenabled <> 'O';
