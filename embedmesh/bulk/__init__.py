"""Many texts, one job: `embedmesh embed IN… -o OUT`, cut into units that anybody may work off, as often as it takes.

`units` cuts the input, and nothing but the input decides how: the same input has the same units in every run. An engine
(`engines`) hands units to workers (`work`), which embed them and write them to a sink (`sinks`). The driver (`job`)
writes a row of the manifest (`manifest`) for each unit that is written; that row is the unit's commit.

To add an engine: a module with `run_units(units, plan, concurrency)` as `engines.RunUnits` says, and a line in
`engines.ENGINES`. It takes units as dicts, a few more than are worked on; has each one worked off by
`UnitWorker(plan)(unit)`, in any process of any machine; and yields the dict that this returns, in any order. The plan
is a dict, too, for where it must travel: `plan.as_dict()`, which `UnitWorker` takes as well. It holds the key of the
gateway: it is for memory and connections, never for a log or a file. A unit that was lost is simply done again.

To add a sink: a class with the methods of `sinks.Sink`, and a line in `sinks.SINKS`. A unit may be written twice, also
by two workers at one time: then there must be one of each row (a file is renamed, a row of a database is replaced by
its id). Secrets of a database come from the worker's environment, never from the command line, which the manifest
keeps.
"""
