"""The store: accounts, keys, holds, the ledger and nodes, in an SQLite file or on a PostgreSQL server.

store       the gateway's side: holds, captures, releases (rules.ports.Ledger); opening: how it begins
keyring, rate_limits, pricing, nodes    keys, limits, prices and nodes, as a gateway sees them
books       the operator's side: accounts, keys, prices, reports; works while gateways run
writer      group commit: what arrived during the last commit is the next batch; medium: how a batch becomes durable
writes      what can be written, and how several writes become one transaction; hold_writes: holds and their ends
topics      what gateways of one store tell each other; instance: who a gateway is in its store
chain       what was written cannot be changed unnoticed; check: every promise of the ledger, looked at row by row
upkeep      what a store needs now and then
db          what both kinds of stores have in common; sqlite, postgres: each kind; engines: which one is meant
sql         statements and migrations, from their files; migrate: bringing a store to this version
backup      a copy of a file; copy: from a file to a server
tokens      what a key looks like; secret: the key-hash secret beside the store; sealed: what is kept encrypted
"""
