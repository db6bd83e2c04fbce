"""The embedded store: accounts, keys, holds and the ledger in one SQLite file.

sqlite      the gateway's side: holds, captures, releases and key look-ups (rules.ports.Keys, rules.ports.Ledger)
books       the operator's side: accounts, credits, keys, checks, backups; works while a gateway runs
writer      group commit: what arrived during the last COMMIT is the next batch
writes      what can be written, and what each write means
check       every promise of the ledger, looked at row by row; after a crash, within a second, what it may have broken
backup      a copy of the whole store; files: what must be whole, private and on disk under its name
connect     opening the file: version, pragmas, modes, migrations, the lock of its one gateway
tokens      what a key looks like; secret: the key-hash secret beside the store
sql         statements and migrations, from their files
"""
