# Before the blocks of a page: what they need to run one after another, and to leave nothing behind.
set -eo pipefail
set -m # each lasting program is a group of its own, and can be interrupted
LASTING=()
declare -A LASTING_IS
BLOCK=none

block() {
    BLOCK=$1
    echo "== $BLOCK"
}

block_ended() {
    echo "== $BLOCK ended"
}

begin_lasting() {
    LASTING_LOG=$(mktemp)
    LASTING_NEXT=$1
}

# A server has said that it is ready, or the page's own commands wait for it.
lasting() {
    LASTING+=("$1")
    LASTING_IS[$1]=$LASTING_NEXT
    LASTING_LOGS+=("$LASTING_LOG")
    case $LASTING_NEXT in
    *"embedmesh serve"*) eventually grep -q Ready: "$LASTING_LOG" ;;
    esac
}

# Run a command until it ends well; it has a minute, on a machine that is busy.
eventually() {
    local last=$((SECONDS + 60))
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS > last)); then
            "$@" >&2 || true
            echo "not within a minute: $*" >&2
            return 1
        fi
        sleep 0.2
    done
}

# Ctrl-C for the lasting programs whose command has this in it.
interrupt() {
    local pid
    for pid in "${LASTING[@]}"; do
        if [[ ${LASTING_IS[$pid]} == *"$1"* ]]; then
            kill -INT -- "-$pid" 2>/dev/null || true
            wait "$pid" || true
        fi
    done
}

not_here() {
    echo "not run, because $1 is not here: $BLOCK"
}

the_end() {
    local code=$? pid log
    trap - EXIT
    for pid in "${LASTING[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    for pid in "${LASTING[@]}"; do wait "$pid" 2>/dev/null || true; done
    if ((code)); then
        echo "ended with $code in $BLOCK"
        for log in "${LASTING_LOGS[@]}"; do
            echo "-- $log"
            tail -20 "$log"
        done
    fi
    rm -f "${LASTING_LOGS[@]}"
    exit "$code"
}
trap the_end EXIT

# A server of another make, for pages that show one: it embeds, wants a key, and knows nothing of gateways.
stand_in() {
    begin_lasting "stand-in on $1"
    EMBEDMESH_API_KEY=$2 embedmesh node --standalone --port "$1" --data-dir "$(mktemp -d)" >"$LASTING_LOG" 2>&1 </dev/null &
    lasting $!
    eventually curl "http://127.0.0.1:$1/health"
}

# A member of a JSON document, by its path: `field data.0.id`.
field() {
    python -c 'import functools, json, sys
print(functools.reduce(lambda value, key: value[int(key) if isinstance(value, list) else key], sys.argv[1].split("."), json.load(sys.stdin)))' "$1"
}

# A program in Python, with this page's endpoint and key in it.
expanded() {
    sed -e "s|[$]BASE_URL|$BASE_URL|g" -e "s|[$]API_KEY|$API_KEY|g" >expanded.py
}

# The gateway that this page has started is the one that is asked from here on.
ask_own() {
    BASE_URL=$(field base_url <"$EMBEDMESH_DATA_DIR/bootstrap.json")
    API_KEY=$(field api_key <"$EMBEDMESH_DATA_DIR/bootstrap.json")
    ADMIN_KEY=$(field admin_key <"$EMBEDMESH_DATA_DIR/bootstrap.json")
}

# A small reranker in a folder of that name. What it says of documents means nothing.
small_reranker() {
    cp -r "$PYTHONPATH/tests/engine/goldens/rerankers/xlm_roberta" "$1"
}

# A server that chats: it repeats what it was told.
stand_in_chat() {
    begin_lasting "a server that chats"
    python -c 'import signal
from tests.little_server import LittleServer
with LittleServer() as server:
    print(server.port, flush=True)
    signal.pause()' >"$LASTING_LOG" 2>&1 </dev/null &
    lasting $!
    eventually test -s "$LASTING_LOG"
    CHAT_PORT=$(cat "$LASTING_LOG")
}
