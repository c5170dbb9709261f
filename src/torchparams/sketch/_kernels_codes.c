/* Codes: patterns of 8 and 16 bits, which are codes themselves, and the counts of all codes. */

#include "_kernels_count.h"

/* The samples are taken where the data is in the cache already: from the first AHEAD bytes. */
int spread_out(const uint8_t *data, size_t n, size_t size)
{
    uint8_t seen[1024] = {0};
    int places = 0;
    if (n * size < AHEAD)
        return 0;
    for (size_t i = 0; i < AHEAD; i += AHEAD / 64) {
        uint8_t *place = &seen[load16(data + i) >> 6];
        places += !*place;
        *place = 1;
    }
    return places > 40;
}

void update_p16(tally *t, const uint8_t *data, size_t n, int mark)
{
    for (size_t i = 0; i < n; i += 2 * BLOCK) {
        size_t m = n - i < 2 * BLOCK ? n - i : 2 * BLOCK;
        const uint8_t *p = data + 2 * i;
        if (all_equal(p, 2 * m, 2))
            t->high[load16(p)] += m;
        else if (spread_out(p, m, 2))
            count_codes(t, p, m, 2, 1);
        else
            count_codes(t, p, m, 2, 0);
        if (mark)
            for (size_t j = 0; j < m; j++)
                t->marks[load16(p + 2 * j) / GROUP] = 1;
    }
}

void update_p8(tally *t, const uint8_t *data, size_t n, int mark)
{
    /* One counter for two neighbours: half the work, the same counts once finish() parts them. */
    update_p16(t, data, n / 2, mark);
    if (n & 1)
        t->tail[data[n - 1]]++;
}

size_t collect(tally *t, int kind)
{
    size_t found = 0, groups = (kind == F64 ? CODES : SHORT) / GROUP, tables = kind == F64 ? 0 : SUBTABLES;
    uint64_t bytes[256];
    if (kind == P8)
        memcpy(bytes, t->tail, sizeof bytes);
    for (size_t g = 0; g < groups; g++) {
        size_t first = g * GROUP;
        if (!t->everywhere) {
            if (g % 8 == 0 && !load64(t->marks + g)) {
                g += 7;
                continue;
            }
            if (!t->marks[g])
                continue;
        }
        t->marks[g] = 0;
        uint64_t any = load64(t->low + first) | load64(t->low + first + 8);
        for (size_t c = first; c < first + GROUP; c++)
            any |= t->high[c];
        for (size_t j = 0; j < tables; j++)
            for (size_t c = first; c < first + GROUP; c++)
                any |= t->tables[j * STRIDE + c];
        if (!any)
            continue;
        for (size_t c = first; c < first + GROUP; c++) {
            uint64_t total = t->high[c] + t->low[c];
            for (size_t j = 0; j < tables; j++)
                total += t->tables[j * STRIDE + c];
            if (!total)
                continue;
            if (kind == P8) {
                bytes[c & 255] += total;
                bytes[c >> 8] += total;
            } else {
                t->codes[found] = (uint32_t)c;
                t->counts[found++] = total;
            }
        }
        memset(t->high + first, 0, GROUP * sizeof t->high[0]);
        memset(t->low + first, 0, GROUP);
        for (size_t j = 0; j < tables; j++)
            memset(t->tables + j * STRIDE + first, 0, GROUP * sizeof t->tables[0]);
    }
    if (kind == P8)
        for (uint32_t c = 0; c < 256; c++)
            if (bytes[c]) {
                t->codes[found] = c;
                t->counts[found++] = bytes[c];
            }
    return found;
}
