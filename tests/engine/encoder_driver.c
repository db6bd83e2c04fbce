/* Runs the kernels on models of random sizes, each array as large as it must be and no larger, for a sanitizer to watch.
   Prints "ok" if no state is infinite or not a number, and all numbers of threads give the same bits. */

#define EMBEDMESH_STAMP "driver"
#include "../../embedmesh/engine/native/encoder.c"

#include <stdio.h>
#include <string.h>

static uint64_t dice = 88172645463325252u;

static int roll(int from, int to) /* both may come out */
{
    dice ^= dice << 13;
    dice ^= dice >> 7;
    dice ^= dice << 17;
    return from + (int)(dice % (uint64_t)(to - from + 1));
}

static float *some(long count)
{
    float *made = malloc((size_t)count * sizeof *made);
    for (long i = 0; i < count; i++)
        made[i] = (float)roll(-1000, 1000) / 2000.0f;
    return made;
}

static struct linear some_linear(int outputs, int inputs)
{
    return (struct linear){some((long)outputs * inputs), some(outputs)};
}

static void forget(struct linear l)
{
    free((float *)l.weight);
    free((float *)l.bias);
}

static int try_one(int number)
{
    int32_t offsets[6] = {0};
    struct layer layers[2];
    struct model m = {.hidden = 16 * roll(1, 8), .heads = roll(1, 4), .width = 16 * roll(1, 3), .middle = 16 * roll(1, 30),
                      .layers = roll(1, 2), .eps = 1e-12f, .layer = layers};
    int texts = roll(1, 5), longest = 0, inner = m.heads * m.width, wrong = 0;
    for (int i = 0; i < texts; i++) {
        int length = roll(0, 3) ? roll(1, 40) : roll(100, 400);
        offsets[i + 1] = offsets[i] + length;
        longest = length > longest ? length : longest;
    }
    long states = (long)offsets[texts] * m.hidden;
    float *norm = some(m.hidden), *given = some(2 * states), *first = malloc((size_t)states * sizeof *first);
    m.norm = (struct norm){norm, norm};
    for (int i = 0; i < m.layers; i++)
        layers[i] = (struct layer){some_linear(3 * inner, m.hidden), some_linear(m.hidden, inner),
                                   some_linear(m.middle, m.hidden), some_linear(m.hidden, m.middle), m.norm, m.norm};
    for (int threads = 1; threads <= 4; threads++) {
        struct pool *pool = embedmesh_start(threads);
        float *space = malloc((size_t)embedmesh_floats(pool, &m, offsets[texts], longest) * sizeof *space);
        for (int again = 0; again < 3; again++) {
            memcpy(space, given, 2 * (size_t)states * sizeof *space);
            embedmesh_run(pool, &m, offsets, texts, longest, space);
            if (threads == 1 && !again)
                memcpy(first, space, (size_t)states * sizeof *space);
            wrong += memcmp(first, space, (size_t)states * sizeof *space) != 0;
        }
        free(space);
        embedmesh_end(pool);
    }
    for (long i = 0; i < states; i++)
        wrong += !isfinite(first[i]);
    for (int i = 0; i < m.layers; i++) {
        forget(layers[i].qkv);
        forget(layers[i].mixed);
        forget(layers[i].wide);
        forget(layers[i].narrow);
    }
    free(norm);
    free(given);
    free(first);
    if (wrong)
        printf("model %d: %d wrong\n", number, wrong);
    return wrong;
}

int main(int count, char **words)
{
    int wrong = 0, models = count > 1 ? atoi(words[1]) : 25;
    for (int number = 0; number < models; number++)
        wrong += try_one(number);
    puts(wrong ? "wrong" : "ok");
    return wrong != 0;
}
