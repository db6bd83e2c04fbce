/* Both ends of a gateway under measurement, in one thread: those who ask, and the cheap node that answers.
 *
 *   ends PORT|PATH[,PORT|PATH ...] VECTOR MODELS REPLY
 *
 * The node listens at each PORT or PATH, as if there were several nodes. It speaks the compact form of the node protocol (docs/reference/node-protocol.md):
 * the vector in the file VECTOR (little-endian float32), once for each input that was asked for, and the tokens that
 * the gateway counted. What is not in that form gets the file REPLY, a whole HTTP response; a GET gets MODELS.
 *
 * Each line on standard input is a load, answered by a line of JSON:
 *
 *   PORT CONNECTIONS WARM_S SECONDS RATE REQUESTS EXPECTED
 *
 * RATE 0: closed loop, every connection asks again as soon as it was answered. Otherwise so many requests a second,
 * each due at its own moment; a time is measured from that moment, also where no connection was free then. REQUESTS is
 * a file with what to send, in turns: requests with a zero byte after each. EXPECTED is a file of lines that must be in
 * the body, in this order. The answer: requests answered right, wrong ones, other statuses, broken connections, seconds,
 * and the times of the right ones in microseconds.
 *
 * During a load it never sleeps: where a process has to be woken on another core, its waker pays for it, on virtual
 * machines dearly, and a slow gateway would pay more often than a fast one. With ENDS_NAP_MS in the environment it
 * sleeps for so long at most, and leaves its core to others meanwhile.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define CONNECTIONS_MAX 4096
#define MESSAGE_BYTES_MAX (1024 * 1024)    /* of one request or reply that is read */
#define COMPACT_BYTES_MAX (8 * 1024 * 1024) /* of one that the node writes: two thousand vectors */
#define FILE_BYTES_MAX (16 * 1024 * 1024)
#define LINES_MAX 64
#define QUESTIONS_MAX 8192
#define NODES_MAX 16
#define TIMES_MAX (8 * 1024 * 1024)
#define SPECIALS 2  /* tokens that the model adds to each input */
#define LATE_S 30.0 /* after the end: what is unanswered by then is broken */

struct connection {
    int fd, asks; /* whether we ask on it, or answer */
    int busy, blocked;
    double due;
    size_t have, sent, question;
    char *data;
};

static struct connection asking[CONNECTIONS_MAX];
static int idle[CONNECTIONS_MAX], idles, poller, listeners[NODES_MAX], nodes;
static struct sockaddr_in gateway = {.sin_family = AF_INET};
static char *questions[QUESTIONS_MAX], *expected[LINES_MAX], body[MESSAGE_BYTES_MAX];
static size_t question_bytes[QUESTIONS_MAX], count, turn, lines;
static char *vector, *models, *reply, compact[COMPACT_BYTES_MAX];
static size_t vector_bytes, models_bytes, reply_bytes;
static float *times;
static long right, wrong, refused, broken;
static double from, until;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static char *read_file(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    char *data = calloc(1, FILE_BYTES_MAX);
    *bytes = fread(data, 1, FILE_BYTES_MAX - 1, file);
    fclose(file);
    return data;
}

static void watch(struct connection *c, int how, int events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, how, c->fd, &event)) die("epoll_ctl");
}

/* The body's bytes once a whole message is here, copied to `body`; -1 before. */
static long whole(char *data, size_t have) {
    char *end = memmem(data, have, "\r\n\r\n", 4), *limit = data + have;
    if (!end) return -1;
    *end = 0; /* the head is text for a moment */
    char *length = strcasestr(data, "\ncontent-length:");
    char *chunked = strcasestr(data, "\ntransfer-encoding: chunked");
    *end = '\r';
    char *at = end + 4;
    if (!chunked) {
        long bytes = length ? atol(length + 16) : 0;
        if (limit - at < bytes) return -1;
        memcpy(body, at, bytes);
        return bytes;
    }
    for (long bytes = 0;;) {
        char *line = memmem(at, limit - at, "\r\n", 2);
        if (!line) return -1;
        long chunk = strtol(at, NULL, 16);
        if (limit - line - 2 < chunk + 2) return -1;
        if (!chunk) return bytes;
        memcpy(body + bytes, line + 2, chunk);
        bytes += chunk;
        at = line + 2 + chunk + 2;
    }
}

/* -- those who ask */

static void dial(struct connection *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&gateway, sizeof gateway)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->asks = 1;
    c->busy = c->blocked = 0;
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
}

static void send_rest(struct connection *c) {
    size_t bytes = question_bytes[c->question];
    while (c->sent < bytes) {
        ssize_t n = send(c->fd, questions[c->question] + c->sent, bytes - c->sent, MSG_NOSIGNAL);
        if (n < 0) break;
        c->sent += n;
    }
    if (c->blocked || c->sent < bytes) {
        c->blocked = c->sent < bytes;
        watch(c, EPOLL_CTL_MOD, EPOLLIN | (c->blocked ? EPOLLOUT : 0));
    }
}

static void ask(struct connection *c, double due) {
    c->busy = 1;
    c->due = due;
    c->have = c->sent = 0;
    c->question = turn++ % count;
    send_rest(c);
}

static int as_expected(long bytes) {
    char *at = body, *limit = body + bytes;
    for (size_t i = 0; i < lines; i++) {
        at = memmem(at, limit - at, expected[i], strlen(expected[i]));
        if (!at) return 0;
        at += strlen(expected[i]);
    }
    return 1;
}

static void hear_answer(struct connection *c) {
    ssize_t n = recv(c->fd, c->data + c->have, MESSAGE_BYTES_MAX - 1 - c->have, 0);
    if (n < 0 && errno == EAGAIN) return;
    int was_busy = c->busy;
    if (n <= 0) { /* it hung up */
        broken += was_busy;
        close(c->fd);
        dial(c);
    } else {
        c->have += n;
        c->data[c->have] = 0;
        long bytes = whole(c->data, c->have);
        if (bytes < 0) return;
        double t = now();
        if (t <= until && c->due >= from) {
            if (atoi(c->data + 9) != 200) refused++;
            else if (!as_expected(bytes)) wrong++;
            else if (right < TIMES_MAX) times[right++] = (t - c->due) * 1e6;
        }
        c->busy = 0;
    }
    if (was_busy) idle[idles++] = c - asking;
}

/* -- the node */

static void say(int fd, const char *data, size_t bytes) {
    while (bytes) {
        ssize_t n = send(fd, data, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return;
        if (n > 0) data += n, bytes -= n;
    }
}

/* MessagePack of {tokens, data} in an HTTP response. `lengths` is the member's value in the question. */
static size_t answer(const unsigned char *lengths, const unsigned char *end) {
    uint32_t bytes = lengths[0] == 0xc4   ? lengths[1]
                     : lengths[0] == 0xc5 ? lengths[1] << 8 | lengths[2]
                                          : 0; /* bin 8 and bin 16: up to 16,383 inputs */
    lengths += lengths[0] == 0xc4 ? 2 : 3;
    uint32_t tokens = 0, length, inputs = bytes / 4, size = inputs * vector_bytes;
    if (lengths + bytes > end || size + 1024 > COMPACT_BYTES_MAX) return 0;
    for (uint32_t i = 0; i < inputs; i++) {
        memcpy(&length, lengths + 4 * i, 4);
        tokens += length + SPECIALS;
    }
    size_t n = sprintf(compact,
                       "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.embedmesh.v2+msgpack\r\n"
                       "Content-Length: %u\r\n\r\n\x82\xa6tokens\xce",
                       size + 23);
    uint32_t in_order[] = {htonl(tokens), htonl(size)};
    memcpy(compact + n, &in_order[0], 4);
    memcpy(compact + n + 4, "\xa4" "data\xc6", 6);
    memcpy(compact + n + 10, &in_order[1], 4);
    n += 14;
    for (uint32_t i = 0; i < inputs; i++, n += vector_bytes) memcpy(compact + n, vector, vector_bytes);
    return n;
}

static void hear_question(struct connection *c) {
    ssize_t n = recv(c->fd, c->data + c->have, MESSAGE_BYTES_MAX - 1 - c->have, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        close(c->fd);
        free(c->data);
        free(c);
        return;
    }
    c->have += n;
    c->data[c->have] = 0;
    long bytes = whole(c->data, c->have);
    if (bytes < 0) return;
    c->have = 0;
    char *lengths = memmem(body, bytes, "\xa7lengths", 8);
    if (!strncmp(c->data, "GET", 3)) say(c->fd, models, models_bytes);
    else if (!lengths) say(c->fd, reply, reply_bytes);
    else say(c->fd, compact, answer((unsigned char *)lengths + 8, (unsigned char *)body + bytes));
}

static void accept_one(int listener) {
    int one = 1;
    struct connection *c = calloc(1, sizeof *c);
    c->fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
    c->data = malloc(MESSAGE_BYTES_MAX);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* a Unix socket refuses it, and needs it not */
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
}

static void listen_at(const char *where) {
    int one = 1, tcp = atoi(where);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(tcp), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_un there = {.sun_family = AF_UNIX};
    strncpy(there.sun_path, where, sizeof there.sun_path - 1);
    int listener = socket(tcp ? AF_INET : AF_UNIX, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (tcp ? bind(listener, (struct sockaddr *)&here, sizeof here) : bind(listener, (struct sockaddr *)&there, sizeof there))
        die("bind");
    if (listen(listener, 1024) || nodes == NODES_MAX) die("listen");
    listeners[nodes] = listener;
    struct epoll_event accepts = {.events = EPOLLIN, .data.ptr = &listeners[nodes++]};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &accepts)) die("epoll_ctl");
}

/* -- both */

static int turn_once(int wait_ms) {
    struct epoll_event events[256];
    int input = 0, n = epoll_wait(poller, events, 256, wait_ms);
    for (int i = 0; i < n; i++) {
        struct connection *c = events[i].data.ptr;
        if (c == NULL) input = 1;
        else if ((int *)c >= listeners && (int *)c < listeners + NODES_MAX) accept_one(*(int *)c);
        else if (!c->asks) hear_question(c);
        else {
            if (events[i].events & EPOLLOUT) send_rest(c);
            if (events[i].events & ~EPOLLOUT) hear_answer(c);
        }
    }
    return input;
}

static int by_size(const void *a, const void *b) {
    float x = *(float *)a, y = *(float *)b;
    return (x > y) - (x < y);
}

static void load(int port, int connections, double warm, double seconds, double rate, char *requests, char *wanted) {
    size_t bytes;
    char *request = read_file(requests, &bytes), *limit = request + bytes, *first = request, *text = read_file(wanted, &bytes);
    for (count = 0; request < limit && count < QUESTIONS_MAX; request += strlen(request) + 1) {
        questions[count] = request;
        question_bytes[count++] = strlen(request);
    }
    lines = 0;
    for (char *line = strtok(text, "\n"); line && lines < LINES_MAX; line = strtok(NULL, "\n")) expected[lines++] = line;
    gateway.sin_port = htons(port);
    idles = right = wrong = refused = broken = 0;
    for (int i = 0; i < connections; i++) {
        if (!asking[i].data) asking[i].data = malloc(MESSAGE_BYTES_MAX);
        dial(&asking[i]);
        idle[idles++] = i;
    }
    char *nap = getenv("ENDS_NAP_MS");
    int nap_ms = nap ? atoi(nap) : 0;
    double begun = now(), next = begun;
    from = begun + warm;
    until = from + seconds;
    for (double t = begun; t < until + LATE_S && (t < until || idles < connections); t = now()) {
        while (idles && t < until && (!rate || next <= t)) {
            ask(&asking[idle[--idles]], rate ? next : t);
            if (rate) next += 1 / rate;
        }
        turn_once(nap_ms);
    }
    broken += connections - idles;
    for (int i = 0; i < connections; i++) close(asking[i].fd);
    qsort(times, right, sizeof *times, by_size);
    double at[] = {0.5, 0.9, 0.99, 0.999};
    const char *names[] = {"p50", "p90", "p99", "p999"};
    printf("{\"right\":%ld,\"wrong\":%ld,\"refused\":%ld,\"broken\":%ld,\"seconds\":%.3f", right, wrong, refused, broken, seconds);
    for (int i = 0; i < 4; i++) printf(",\"%s_us\":%.1f", names[i], right ? times[(long)(at[i] * (right - 1))] : 0.0);
    printf(",\"max_us\":%.1f}\n", right ? times[right - 1] : 0.0);
    fflush(stdout);
    free(first);
    free(text);
}

int main(int argc, char **argv) {
    if (argc != 5) return fprintf(stderr, "ends PORT|PATH[,PORT|PATH ...] VECTOR MODELS REPLY\n"), 2;
    vector = read_file(argv[2], &vector_bytes);
    models = read_file(argv[3], &models_bytes);
    reply = read_file(argv[4], &reply_bytes);
    times = malloc(TIMES_MAX * sizeof *times);
    poller = epoll_create1(0);
    for (char *where = strtok(argv[1], ","); where; where = strtok(NULL, ",")) listen_at(where);
    struct epoll_event told = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, 0, &told)) die("epoll_ctl");
    for (;;) {
        int port, connections;
        double warm, seconds, rate;
        char line[4096], requests[2048], wanted[2048];
        if (!turn_once(-1)) continue;
        ssize_t n = read(0, line, sizeof line - 1);
        if (n <= 0) return 0;
        line[n] = 0;
        if (sscanf(line, "%d %d %lf %lf %lf %2047s %2047s", &port, &connections, &warm, &seconds, &rate, requests, wanted) != 7)
            return fprintf(stderr, "what load is that: %s", line), 2;
        load(port, connections, warm, seconds, rate, requests, wanted);
    }
}
