"""The limits that callers, nodes and operators can meet: a name that says what it bounds, its unit, and its reason.

Limits that nobody outside can meet stand beside the code that they bound.
"""

# -- one request

REQUEST_BODY_BYTES_MAX = 4 * 1024 * 1024  # 300,000 tokens of ordinary text are 1.5 MB; JSON escapes may double that
REQUEST_INPUTS_MAX = 2_048  # what OpenAI's API takes in one request
REQUEST_TOKENS_MAX = 300_000  # what OpenAI's API takes in one request
USER_CHARS_MAX = 512  # of the member `user`

# -- how long it may take, in seconds; total, not per read

REQUEST_MIN_S = 30.0  # what every request may take, however small
REQUEST_MAX_S = 600.0
WRITE_REPLY_S = 20.0  # as long as a body may take to arrive, a reply may take to leave
HOLD_GRACE_S = 5.0  # for the commit of the capture itself, and clocks that differ
CONNECT_S = 1.0  # nodes are near, or not worth asking
ATTEMPTS_MAX = 3  # of a part, on distinct nodes

# -- connections, heads and bodies (http/)

# -- how much may be under way at one time (gateway/)

# -- accounts, keys and prices (storage/)

# -- nodes and their messages (node/, fleet/, gateway/nodes/)

NODE_MESSAGE_BYTES_MAX = 512 * 1024  # a heartbeat with a thousand receipts has 200 kB
OFFERS_MAX = 64  # models of one node: four times what one serves
HEARTBEAT_RECEIPTS_MAX = 1_000
DIALLED_IN_FLIGHT_MAX = 16  # parts on a node that dials out: as many as it keeps connections
PENDING_OF_ORIGIN_MAX = 10  # nodes of one address that wait for approval, of a hundred in all: others use invites
KNOWN_A_MINUTE_MAX = 600  # registrations of admitted nodes: each comes twice a day, and at every start
STRANGERS_A_MINUTE_MAX = 3_000  # a hundred pending nodes ask twelve times each; 3,000 signatures take 0.3 s
ADDRESS_CHECKS_MAX = 8  # at one time, for registrations; each may keep a thread of the resolver busy
ADDRESS_CHARS_MAX = 300  # of a node: scheme, the longest DNS name and a port take 267
UPSTREAM_URL_CHARS_MAX = 300

# -- models and their files (engine/, provision/)
