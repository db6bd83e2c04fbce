-- Runs before the new code. Adds acts, with the same tables as SQLite's script: see there for what each is for.

-- -- acts

CREATE TABLE acts (
    act_id BIGINT PRIMARY KEY CHECK (act_id > 0),
    created_ms BIGINT NOT NULL,
    actor TEXT NOT NULL,
    verb TEXT NOT NULL,
    object_id TEXT NOT NULL,
    changes TEXT NOT NULL,
    origin TEXT NOT NULL,
    request_id TEXT NOT NULL,
    hash BYTEA NOT NULL UNIQUE CHECK (length(hash) = 32)
);
CREATE INDEX acts_of_object ON acts (object_id, act_id);
CREATE INDEX acts_of_actor ON acts (actor, act_id);

CREATE FUNCTION grow_acts() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.act_id <= (SELECT max(act_id) FROM acts) THEN
        RAISE EXCEPTION 'an act follows all others' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER acts_grow BEFORE INSERT ON acts FOR EACH ROW EXECUTE FUNCTION grow_acts();
CREATE TRIGGER acts_stay BEFORE DELETE ON acts FOR EACH ROW EXECUTE FUNCTION refuse('acts are append-only');
CREATE TRIGGER acts_stay_all BEFORE TRUNCATE ON acts EXECUTE FUNCTION refuse('acts are append-only');
CREATE TRIGGER acts_never_change BEFORE UPDATE ON acts FOR EACH ROW EXECUTE FUNCTION refuse('acts are append-only');

INSERT INTO facts (name, value) VALUES ('acts', '0');

CREATE TRIGGER acts_are_counted_up BEFORE UPDATE ON facts FOR EACH ROW
WHEN (OLD.name = 'acts' AND (NEW.name <> 'acts' OR length(NEW.value) < length(OLD.value)
    OR (length(NEW.value) = length(OLD.value) AND NEW.value COLLATE "C" < OLD.value COLLATE "C")))
EXECUTE FUNCTION refuse('acts are append-only');
CREATE TRIGGER acts_stay_counted BEFORE DELETE ON facts FOR EACH ROW
WHEN (OLD.name = 'acts') EXECUTE FUNCTION refuse('acts are append-only');

ALTER TABLE blocks ADD COLUMN acts BIGINT CHECK (acts > 0);
