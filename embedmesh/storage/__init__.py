"""The store: accounts, keys, holds, the ledger and nodes, in an SQLite file or on a PostgreSQL server.

store       the gateway's side: the ports Keys, Ledger, Prices and RateLimits of one gateway
opening     how it begins: connections, recovery after a crash; instance: the gateway's name in its store
nodes       nodes and invites
cached/     what a gateway has in memory: keys, prices, rate_limits (leases), changes (when to read again)
ledger/     group_commit, batch, writes: how writes become durable; place_hold, room, end_hold; chain, check: proofs
books/      the operator's side: accounts, keys, prices, reports
secrets/    secret: the key secret beside the store; sealed: encrypted columns; tokens: the form of a key
upkeep      the chain extended, old records deleted
db          what both kinds of stores have in common; engines: which kind a DSN names; reads: reading beside the writer
sqlite/     database, commit (how a batch becomes durable), backup; postgres/: database, gateway
migrate     bringing a store to this program's version; copy: from a file to a server
sql         statements/ and migrations/, read from their files; times: days and months
"""
