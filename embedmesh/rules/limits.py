"""The limits that callers, nodes and operators can meet: a name that says what it bounds, its unit, and its reason.

Limits that nobody outside can meet stand beside the code that they bound.
"""

# -- one request

REQUEST_BODY_BYTES_MAX = 4 * 1024 * 1024  # 300,000 tokens of ordinary text are 1.5 MB; JSON escapes may double that
REQUEST_INPUTS_MAX = 2_048  # what OpenAI's API takes in one request
REQUEST_TOKENS_MAX = 300_000  # what OpenAI's API takes in one request
RERANK_DOCUMENTS_MAX = 2_048  # of one rerank request: as many as there are inputs of other requests
RERANK_TOKENS_MAX = 2_048 * 512  # of its pairs: as many documents, each as long as common rerankers take
USER_CHARS_MAX = 512  # of the field `user`
IDEMPOTENCY_KEY_CHARS_MAX = 255
IDEMPOTENCY_WAITERS_MAX = 128  # requests that wait for the first with their key; each asks the store 4 times a second
UNREAD_S = 60.0  # a reply that its caller broke off is kept for a retry; SDKs give up long before
KEPT_REPLY_BYTES_MAX = 8 * 1024 * 1024  # of one reply kept for an Idempotency-Key: 2,048 vectors of 1,024 components
KEPT_REPLIES_BYTES_MAX = 256 * 1024 * 1024  # of all that are kept for one account

# -- confidential requests

LOCK_TOKENS = 8_192  # that a lock covers where the caller says nothing, as in the reference
LOCK_S_MIN, LOCK_S, LOCK_S_MAX = 5, 30, 60  # seconds to use it; SDKs do at once, a large body on a bad line needs 20
LOCKS_OF_KEY_MAX = 64  # open at one time; a program that locks for each request has as many as it sends at once
LOCKS_OF_ACCOUNT_MAX = 256
CONFIDENTIAL_KEY_S = 86_400  # a node makes new keys for confidential requests every day
CONFIDENTIAL_OVERLAP_S = 900  # and keeps the old ones for longer than the last lock and its request may last
SEALED_CALL_BYTES_MAX = (
    REQUEST_BODY_BYTES_MAX + 256 * 1024
)  # at a node: the largest body, padded by 3 %, and its members
BYTES_A_TOKEN_MAX = 128  # of a sealed request: a node's count is at least a token for that many; text has twenty times

# -- how long it may take, in seconds; total, not per read

REQUEST_MIN_S = 30.0  # what every request may take, however small
REQUEST_MAX_S = 600.0
WRITE_REPLY_S = 20.0  # as long as a body may take to arrive, a reply may take to leave
HOLD_GRACE_S = 5.0  # for the commit of the capture itself, and clocks that differ
CONNECT_S = 1.0  # nodes are near, or not worth asking
ATTEMPTS_MAX = 3  # of a part, on distinct nodes

# -- connections, heads and bodies (http/)

CONNECTIONS_MAX = 8_192  # about 20 kB each when idle
KEEP_ALIVE_S = 75.0  # longer than common proxies keep an idle connection, so that they close first
REQUEST_HEAD_S = 10.0  # a head is a few hundred bytes; ten seconds is a very bad line
REQUEST_HEAD_BYTES_MAX = 64 * 1024  # of a head that comes in pieces; a whole one is as large as one read
URI_BYTES_MAX = 8_000  # RFC 9110 asks for at least as much
REQUEST_HEADER_BYTES_MAX = 8_190  # of one header; a bearer key has 50
REQUEST_HEADERS_MAX = 128  # an SDK sends twenty
REQUEST_BODY_S = 20.0  # for a whole body: 4 MiB in 20 s is 1.7 Mbit/s
SMALL_BODY_BYTES_MAX = 64 * 1024  # of a request for a small route, such as the admin API
AWAITED_BODIES_MAX = 1_024  # unfinished bodies: their connections are in a request, and are not closed for others
REFUSED_BODY_S = 2.0  # how long the rest of a refused body is read, so that its sender sees the answer, not a reset

# -- how much may be under way at one time (gateway/)

ACCOUNT_CALLS_MAX = 64  # of `/v1/account`, or of batches, until their replies are read; the largest have two megabytes
PAGE_REPLIES_MAX = 64  # of `/docs` and `/openapi.json`, about 100 kB each, until they are read
BOOKS_WAITING_MAX = 64  # calls to the books; each takes a few milliseconds
BOOKS_ANSWER_S = 5.0  # how long a call to the books may take, its wait included
LEDGER_CHECKS_MAX = 2  # one that runs, one that waits
LEDGER_CHECK_S = 60.0  # a million requests; a proxy waits no longer
NODE_REPORTS_A_MINUTE_MAX = 150  # of one node: thirty, and more to catch up with 30,000 receipts

# -- small requests and replies (gateway/api/)

REGISTRATION_BYTES_MAX = 160 * 1024  # 64 offers with the longest names, twice in base64; an ordinary one has 2 kB
USAGE_DAYS_MAX = 366
USAGE_ROWS_MAX = 10_000  # one for each day, model and key
INVITE_S_MAX = 30 * 86_400
INVITE_NOTE_CHARS_MAX = 128
NODE_WEIGHT_MAX = 1e6
OVERLAP_S_MAX = 365 * 86_400  # how long a rotated key may stay good

# -- accounts, keys and prices (storage/)

ACCOUNT_KEYS_MAX = 1_000  # good ones: revoking a key ends all keys below it in one statement, in milliseconds
ACCOUNT_KEYS_A_DAY_MAX = 1_000  # made by an account's keys: keys are never deleted, and nobody shall fill the store
KEYS_ABOVE_MAX = 4  # above a key: a hold looks at each of them
KEY_NAME_CHARS_MAX = 128
KEY_MODELS_MAX = 64
KEY_LIMIT_MAX = 10**12  # of requests or tokens a minute, or at one time
MODEL_ID_CHARS_MAX = 200
REFERENCE_CHARS_MAX = 255  # of a payment's reference
PAGE_ROWS_MAX = 1_000  # of a list
IDEMPOTENCY_KEY_S = 86_400  # as long as an Idempotency-Key stands for its reply

# -- nodes and their messages (node/, fleet/, gateway/nodes/)

NODE_MESSAGE_BYTES_MAX = 512 * 1024  # a heartbeat with a thousand receipts has 200 kB
PENDING_NODES_MAX = 100  # that wait for the operator's approval
DIALLED_CONNECTIONS = 16  # that a node without an address keeps open: as many calls may run on it at one time
UPSTREAM_TOKEN_CHARS_MAX = 4_096  # of another server's bearer token, also in a key file; ours have about 50
UPSTREAM_PREFIX_CHARS_MAX = 1_024  # words that a server of another make wants before every text
UPSTREAM_IN_FLIGHT_MAX = 1_024  # requests that one such server may work on at one time; vLLM's own bound is 256
UPSTREAM_IN_FLIGHT = 16  # where the operator says nothing: it embeds a few batches at one time,
UPSTREAM_GENERATING = 32  # and generates for more, since most of its answers take seconds
NODE_NAME_CHARS_MAX = 64
OFFERS_MAX = 64  # models of one node: four times what one serves
HEARTBEAT_RECEIPTS_MAX = 1_000
PENDING_OF_ORIGIN_MAX = 10  # nodes of one address that wait for approval, of a hundred in all: others use invites
KNOWN_A_MINUTE_MAX = 600  # registrations of admitted nodes: each comes twice a day, and at every start
STRANGERS_A_MINUTE_MAX = 3_000  # a hundred pending nodes ask twelve times each; 3,000 signatures take 0.3 s
ADDRESS_CHECKS_MAX = 8  # at one time, for registrations; each may keep a thread of the resolver busy
ADDRESS_CHARS_MAX = 300  # of a node: scheme, the longest DNS name and a port take 267
UPSTREAM_URL_CHARS_MAX = 300

# -- models and their files (engine/, provision/)

CONTEXT_TOKENS_MAX = 16_000_000  # of a model that generates; the longest that we know takes ten
TEMPLATE_TOKENS = 16  # a chat's template around a message: role, marks and line ends; the wordiest known has a dozen
TEMPLATE_TOKENS_MAX = 100_000  # some templates carry a page of their own
GENERATED_CHOICES_MAX = 128  # answers of one request, as OpenAI has it
IMAGES_MAX = 10  # of one request, as OpenAI has it
VECTOR_WIDTH_MAX = 65_536  # sixteen times the widest model we know of; bounds the size of a reply
PROMPT_CHARS_MAX = 1_024  # a prompt is a few words and is paid with every text
CATALOGUE_BYTES_MAX = 4 * 1024 * 1024  # about ten thousand models
MODEL_PRICE_MAX = 10**15  # nano-USD per million tokens, a dollar a token; the dearest request still fits 64 bits
NODE_PRICE_MAX = 10**12  # nano-USD per million tokens, $1,000; more is a number of nano-USD given for one of USD
NODE_MODELS_MAX = 16  # of one process; each is a worker of 200 MB or more
STATIC_TOKENS_MAX = 8_192  # of one input; a static model has no longest text, this is what the longest encoders take
MODEL_CONFIG_BYTES_MAX = 1024 * 1024  # of one JSON file of a model's folder; the largest in use have some 30 kB
MODEL_MODULES_MAX = 16  # published models have at most five
MODEL_SHARDS_MAX = 64  # published models that a CPU can serve have some 10

# -- files and batches (jobs/, storage/)

BATCH_FILE_BYTES_MAX = 200 * 1024 * 1024  # of a batch's file, as OpenAI has it
BATCH_LINES_MAX = 50_000  # of a batch, as OpenAI has it; a setting raises it
BATCH_INPUTS_MAX = 50_000  # of a batch's embeddings requests together, likewise
BATCH_LINES_LIMIT = 1_000_000  # the highest setting of both: unit rows and keyed ids of that number of lines take 20 MB
BATCH_WINDOW_S = 86_400  # until a batch expires: the only window that OpenAI has
BATCH_GRACE_S = 900.0  # after that, for units under way and for the output files; then its money goes back
BATCH_ERRORS_MAX = 100  # told of a file that is not right
BATCHES_OPEN_OF_ACCOUNT_MAX = 100  # not over: each may have a thousand rows of units
BATCHES_OPEN_MAX = 1_000  # of all accounts, each a share: gateways look through them every second for a free one
BATCHES_OF_ACCOUNT_A_DAY_MAX = 2_000  # each is a row that is kept for a month
BATCHES_UNPAID_OF_ACCOUNT_A_DAY_MAX = 300  # that failed, or have no answer yet: nobody shall fill the store for nothing
BATCH_KEPT_S = 30 * 86_400  # after its end; its files expire by then
METADATA_PAIRS_MAX, METADATA_KEY_CHARS_MAX, METADATA_VALUE_CHARS_MAX = 16, 64, 512  # as OpenAI has it
METADATA_BYTES_MAX = 16 * 1024  # of all of it as JSON: it is kept, and a character may take six
UNIT_LINES_MAX = 256  # settled in one step: some milliseconds of the store
UNIT_TOKENS_MAX = 50_000  # some seconds of a node: that much is done again after a crash
UNIT_REPLY_BYTES_MAX = 4 * 1024 * 1024  # of its results, which are in memory until they are written
UNIT_BYTES_MAX = 4 * 1024 * 1024  # of its lines, some of which are in memory several times over
UNITS_A_WRITE_MAX = 512  # rows of units in one write: about two milliseconds
FILE_EXPIRES_S = 30 * 86_400  # as at OpenAI
FILE_EXPIRES_S_MIN, FILE_EXPIRES_S_MAX = 3_600, 30 * 86_400  # that a caller may ask for
FILENAME_CHARS_MAX = 255  # the longest name that common file systems have
FILES_OF_ACCOUNT_MAX = 10_000  # as many batches as are kept have a file each; output files are not refused
UPLOADS_MAX = 64  # at one time, each account up to a share: each has half a MB in memory, with object storage 2.5
BATCH_LINE_BYTES_MAX = REQUEST_BODY_BYTES_MAX + 64 * 1024  # the largest body, and what stands around it
CUSTOM_ID_CHARS_MAX = 512
UPLOAD_BYTES_A_SECOND_MIN = 64 * 1024  # of a file: half a megabit a second; the largest takes an hour at most
FILES_PAGE_ROWS_MAX = 10_000  # that a caller may ask for, as at OpenAI; it gets PAGE_ROWS_MAX at most
BATCHES_PAGE_ROWS_MAX = 100  # as at OpenAI
FILE_CALLS_MAX = 128  # uploads and downloads at one time, those included whose file has not begun yet

# -- jobs (storage/, flow/)

JOB_S, JOB_S_MAX = 86_400, 7 * 86_400  # until it expires: by default, and at most; its money is set aside so long
JOB_GRACE_S = REQUEST_MAX_S + 60.0  # after that, for requests under way; then its money goes back
JOB_NAME_CHARS_MAX = 64
JOB_TEXTS_MAX = 10**12  # that a caller may announce
JOB_REQUESTS_MAX = 1_000_000  # charged keys of one job, which are known as long as it: a row of 300 bytes each
JOB_RECOMPUTES_MAX = 4  # times what a job has paid for: kills in a row, and no more work than that for nothing
JOBS_OPEN_OF_ACCOUNT_MAX = 100  # not over
JOBS_OF_ACCOUNT_A_DAY_MAX = 2_000  # one over nothing costs nothing, and its row is kept: nobody shall fill the store
JOB_KEPT_S = 30 * 86_400  # after it would have expired
JOBS_PAGE_ROWS_MAX = 100
