/* Sums of outer products, example by example: the products that processor.py describes.
 *
 * Operands are packed into panels: for each index that is summed over, sixteen numbers that lie side by side. Tiles of
 * sixteen by sixteen products are then made in registers, a vector of a panel, or of two, times each number of another.
 *
 * Numbers are summed in runs of 32, the runs of a block in float32, and blocks in double precision.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../_vectors.h"
#include "_team.h"

#if SEVERAL_PROCESSORS
#include <immintrin.h>

enum { LANES = 16, TILE = LANES * LANES, RUN = 32, BLOCK = 256, MOST_OPERANDS = 16 };
enum { LINE = 4 * LANES, AHEAD = 4 * LANES }; /* bytes of a cache's line; numbers of four lines */

typedef float vector_16 __attribute__((vector_size(64), may_alias)), vector_8 __attribute__((vector_size(32), may_alias));
typedef int32_t picked_8 __attribute__((vector_size(32)));

/* A matrix for each example and group: element (row, column) lies at rows[row] + columns[column].
 *
 * Of windows that are told by the pixels of an image these are its pixels and channels, and the pixels are numbered as if
 * the zeros around it were there: row r is pixel spots[r], and window s sees under tap k pixel where[s] + taps[k].
 *
 * Where there is room, the image is first copied to that much memory, with zeros around it: numbers[0] is where its first
 * number goes, then come its size, its stride and that of the copy along each of five axes, in the order of a loop. */
typedef struct {
    const float *data;
    Py_ssize_t example, group, width;
    const int64_t *rows, *columns;
    Py_ssize_t row_count, pixels, tap_count; /* zero where rows are positions */
    const int64_t *where, *taps, *spots;
    Py_ssize_t room;
    const int64_t *numbers;
} operand;

/* Everything below is compiled for each kind of processor, with as many rows at once as its registers hold. */
#define FOR(kind) __attribute__((target("arch=" kind)))
#define ALIGNED __attribute__((aligned(64)))

static inline int consecutive(const int64_t *places, int count)
{
    int same = 1;
    for (int i = 1; i < count; i++)
        same &= places[i] == places[0] + i;
    return same;
}

/* How many of sixteen places lie side by side, again and again: 16, 8, 4, or 1 for none. */
static inline int side_by_side(const int64_t *places)
{
    for (int run = LANES; run >= 4; run /= 2) {
        int same = 1;
        for (int start = 0; start < LANES; start += run)
            same &= consecutive(places + start, run);
        if (same)
            return run;
    }
    return 1;
}

#define LOWER(d, l) ((l) & (d) ? 8 + (l) - (d) : (l))
#define UPPER(d, l) ((l) & (d) ? 8 + (l) : (l) + (d))
#define FOUR(which, d, l) which(d, l), which(d, (l) + 1), which(d, (l) + 2), which(d, (l) + 3)
#define EXCHANGE(d)                                                                             \
    for (int r = 0; r < 8; r++)                                                                 \
        if (!(r & (d))) {                                                                       \
            vector_8 one = row[r], other = row[r + (d)];                                        \
            row[r] = __builtin_shuffle(one, other, (picked_8){FOUR(LOWER, d, 0), FOUR(LOWER, d, 4)});       \
            row[r + (d)] = __builtin_shuffle(one, other, (picked_8){FOUR(UPPER, d, 0), FOUR(UPPER, d, 4)}); \
        }

/* tile[p][r][l] = sum over i of one[i][r] * other[p][at[i]][l], for N rows and P panels, by vectors of W numbers; WAYS sums
 * side by side hide the time that an addition takes. With two panels each number of one is read once for both. */
#define DEFINE_TILE(KIND, W, N, P, WAYS)                                                                        \
    FOR(KIND) static void tile_##N##_##P##_##W(const float *one, const float *const *other, const int64_t *at,  \
                                               Py_ssize_t depth, float *tile)                                   \
    {                                                                                                           \
        enum { EACH = LANES / W, VECTORS = P * EACH };                                                          \
        for (Py_ssize_t start = 0; start < depth; start += RUN) {                                               \
            Py_ssize_t stop = start + RUN < depth ? start + RUN : depth, i = start;                             \
            vector_##W sum[WAYS][N][VECTORS] = {{{{0}}}};                                                       \
            for (; i + WAYS <= stop; i += WAYS)                                                                 \
                for (int way = 0; way < WAYS; way++)                                                            \
                    for (int v = 0; v < VECTORS; v++) {                                                         \
                        const float *line = other[v / EACH] + at[i + way] * LANES;                              \
                        vector_##W right = *(const vector_##W *)(line + v % EACH * W);                          \
                        for (int r = 0; r < N; r++)                                                             \
                            sum[way][r][v] += one[(i + way) * LANES + r] * right;                               \
                    }                                                                                           \
            for (; i < stop; i++)                                                                               \
                for (int v = 0; v < VECTORS; v++) {                                                             \
                    const float *line = other[v / EACH] + at[i] * LANES;                                        \
                    vector_##W right = *(const vector_##W *)(line + v % EACH * W);                              \
                    for (int r = 0; r < N; r++)                                                                 \
                        sum[0][r][v] += one[i * LANES + r] * right;                                             \
                }                                                                                               \
            for (int r = 0; r < N; r++)                                                                         \
                for (int v = 0; v < VECTORS; v++) {                                                             \
                    vector_##W *total = (vector_##W *)(tile + v / EACH * TILE + r * LANES + v % EACH * W);      \
                    for (int way = 1; way < WAYS; way++)                                                        \
                        sum[0][r][v] += sum[way][r][v];                                                         \
                    if (start)                                                                                  \
                        sum[0][r][v] += *total;                                                                 \
                    *total = sum[0][r][v];                                                                      \
                }                                                                                               \
        }                                                                                                       \
    }

/* Sixteen numbers of one index, in pieces that lie side by side. */
static inline void copied(const float *data, const int64_t *lanes, int run, float *to)
{
    if (run == 16)
        memcpy(to, data + lanes[0], 16 * sizeof(float));
    else if (run == 8)
        for (int lane = 0; lane < LANES; lane += 8)
            memcpy(to + lane, data + lanes[lane], 8 * sizeof(float));
    else
        for (int lane = 0; lane < LANES; lane += 4)
            memcpy(to + lane, data + lanes[lane], 4 * sizeof(float));
}

/* panel[i][l] = data[lanes[l] + i], for i and l of 0 to 15: squares turned over in registers. */
FOR("x86-64-v3") static void turned_8(const float *data, const int64_t *lanes, float *panel)
{
    for (int lane = 0; lane < LANES; lane += 8)
        for (int i = 0; i < LANES; i += 8) {
            vector_8 row[8];
            for (int r = 0; r < 8; r++)
                memcpy(&row[r], data + lanes[lane + r] + i, sizeof row[r]);
            EXCHANGE(4) EXCHANGE(2) EXCHANGE(1)
            for (int r = 0; r < 8; r++)
                memcpy(panel + (i + r) * LANES + lane, &row[r], sizeof row[r]);
        }
}

/* The same, squares of four in each quarter of a vector: reading puts quarters in their places. */
FOR("x86-64-v4") static void turned_16(const float *data, const int64_t *lanes, float *panel)
{
    for (int i = 0; i < LANES; i += 4, panel += 4 * LANES) {
        __m512 row[4], half[4];
        for (int r = 0; r < 4; r++) /* sixteen rows are more than a processor foresees by itself */
            __builtin_prefetch(data + lanes[i + r] + AHEAD);
        for (int r = 0; r < 4; r++) {
            row[r] = _mm512_castps128_ps512(_mm_loadu_ps(data + lanes[r] + i));
            row[r] = _mm512_insertf32x4(row[r], _mm_loadu_ps(data + lanes[4 + r] + i), 1);
            row[r] = _mm512_insertf32x4(row[r], _mm_loadu_ps(data + lanes[8 + r] + i), 2);
            row[r] = _mm512_insertf32x4(row[r], _mm_loadu_ps(data + lanes[12 + r] + i), 3);
        }
        for (int r = 0; r < 4; r += 2) {
            half[r] = _mm512_unpacklo_ps(row[r], row[r + 1]);
            half[r + 1] = _mm512_unpackhi_ps(row[r], row[r + 1]);
        }
        for (int r = 0; r < 2; r++) {
            __m512d one = _mm512_castps_pd(half[r]), other = _mm512_castps_pd(half[r + 2]);
            _mm512_storeu_pd(panel + 2 * r * LANES, _mm512_unpacklo_pd(one, other));
            _mm512_storeu_pd(panel + (2 * r + 1) * LANES, _mm512_unpackhi_pd(one, other));
        }
    }
}

#define DEFINE(KIND, W, WIDEST)                                                                                        \
DEFINE_TILE(KIND, W, 8, 2, 1)                                                                                          \
DEFINE_TILE(KIND, W, 8, 1, 1)                                                                                          \
DEFINE_TILE(KIND, W, 4, 1, 1)                                                                                          \
DEFINE_TILE(KIND, W, 2, 1, 2)                                                                                          \
DEFINE_TILE(KIND, W, 1, 1, 4)                                                                                          \
                                                                                                                       \
/* One panel, or a pair of them. */                                                                                    \
FOR(KIND) static void tile_##W(const float *one, const float *const *other, const int64_t *at, int panels,             \
                               Py_ssize_t depth, int rows, float *tile)                                                \
{                                                                                                                      \
    int together = 0;                                                                                                  \
    for (; WIDEST == 8 && panels == 2 && together + 8 <= rows; together += 8)                                          \
        tile_8_2_##W(one + together, other, at, depth, tile + together * LANES);                                       \
    for (int panel = 0; panel < panels; panel++, other++, tile += TILE) {                                              \
        int r = together;                                                                                              \
        for (; WIDEST == 8 && r + 8 <= rows; r += 8)                                                                   \
            tile_8_1_##W(one + r, other, at, depth, tile + r * LANES);                                                 \
        for (; r + 4 <= rows; r += 4)                                                                                  \
            tile_4_1_##W(one + r, other, at, depth, tile + r * LANES);                                                 \
        for (; r + 2 <= rows; r += 2)                                                                                  \
            tile_2_1_##W(one + r, other, at, depth, tile + r * LANES);                                                 \
        for (; r < rows; r++)                                                                                          \
            tile_1_1_##W(one + r, other, at, depth, tile + r * LANES);                                                 \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
/* panel[i][l] = data[lanes[l] + depths[i]], zero for absent lanes. */                                                 \
FOR(KIND) static void pack_##W(const float *data, const int64_t *lanes, Py_ssize_t count, const int64_t *depths,       \
                               Py_ssize_t depth, float *panel)                                                         \
{                                                                                                                      \
    if (count < LANES) {                                                                                               \
        memset(panel, 0, depth * LANES * sizeof(float));                                                               \
        for (Py_ssize_t lane = 0; lane < count; lane++)                                                                \
            for (Py_ssize_t i = 0; i < depth; i++)                                                                     \
                panel[i * LANES + lane] = data[lanes[lane] + depths[i]];                                               \
        return;                                                                                                        \
    }                                                                                                                  \
    const int run = side_by_side(lanes);                                                                               \
    if (run > 1)                                                                                                       \
        for (Py_ssize_t i = 0; i < depth; i++)                                                                         \
            copied(data + depths[i], lanes, run, panel + i * LANES);                                                   \
    for (Py_ssize_t i = 0; run == 1 && i < depth;)                                                                     \
        if (i + LANES <= depth && consecutive(depths + i, LANES)) {                                                    \
            turned_##W(data + depths[i], lanes, panel + i * LANES);                                                    \
            i += LANES;                                                                                                \
        } else {                                                                                                       \
            for (int lane = 0; lane < LANES; lane++)                                                                   \
                panel[i * LANES + lane] = data[lanes[lane] + depths[i]];                                               \
            i++;                                                                                                       \
        }                                                                                                              \
}                                                                                                                      \
                                                                                                                       \
/* total += tile, in double precision. */                                                                              \
FOR(KIND) static void add_##W(const float *tile, int rows, int first, double *total)                                   \
{                                                                                                                      \
    if (first)                                                                                                         \
        for (int i = 0; i < rows * LANES; i++)                                                                         \
            total[i] = tile[i];                                                                                        \
    else                                                                                                               \
        for (int i = 0; i < rows * LANES; i++)                                                                         \
            total[i] += tile[i];                                                                                       \
}                                                                                                                      \
                                                                                                                       \
/* The same in float32. */                                                                                              \
FOR(KIND) static void join_##W(const float *tile, int rows, float *total)                                              \
{                                                                                                                      \
    for (int i = 0; i < rows * LANES; i++)                                                                             \
        total[i] += tile[i];                                                                                           \
}                                                                                                                      \
                                                                                                                       \
/* to[r][l * apart] = tile[r][l], of rows of such a width, and the sum of their squares. */                            \
FOR(KIND) static double place_##W(const float *tile, int rows, int lanes, float *to, Py_ssize_t width,                 \
                                  Py_ssize_t apart)                                                                    \
{                                                                                                                      \
    double squares[LANES] = {0}, sum = 0;                                                                              \
    for (int r = 0; r < rows; r++, tile += LANES, to += width) {                                                       \
        for (int lane = 0; lane < lanes; lane++)                                                                       \
            to[lane * apart] = tile[lane];                                                                             \
        for (int lane = 0; lane < LANES; lane++)                                                                       \
            squares[lane] += (double)tile[lane] * tile[lane];                                                          \
    }                                                                                                                  \
    for (int lane = 0; lane < lanes; lane++)                                                                           \
        sum += squares[lane];                                                                                          \
    return sum;                                                                                                        \
}                                                                                                                      \
                                                                                                                       \
/* total[down[r]][across[l]] += tile[r][l], of a matrix whose rows lie so far apart. */                                 \
FOR(KIND) static void scatter_##W(const float *tile, const int64_t *down, int rows, const int64_t *across, int lanes,  \
                                  int first, float *total, Py_ssize_t apart)                                           \
{                                                                                                                      \
    const int run = lanes == LANES ? side_by_side(across) : 1;                                                         \
    for (int r = 0; r < rows; r++, tile += LANES) {                                                                    \
        float *to = total + down[r] * apart;                                                                           \
        if (run == 16)                                                                                                 \
            for (int lane = 0; lane < LANES; lane++)                                                                   \
                to[across[0] + lane] = (first ? 0 : to[across[0] + lane]) + tile[lane];                                \
        else if (run == 8)                                                                                             \
            for (int start = 0; start < LANES; start += 8)                                                             \
                for (int lane = 0; lane < 8; lane++)                                                                   \
                    to[across[start] + lane] = (first ? 0 : to[across[start] + lane]) + tile[start + lane];            \
        else                                                                                                           \
            for (int lane = 0; lane < lanes; lane++)                                                                   \
                to[across[lane]] = (first ? 0 : to[across[lane]]) + tile[lane];                                        \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
/* tile[r][l] = sum over taps of pixels[one[r] + tap][other[l] + tap], zero for absent lanes. */                       \
FOR(KIND) static void shifted_##W(const float *pixels, Py_ssize_t apart, const int64_t *one, int rows,                \
                                  const int64_t *other, int lanes, const int64_t *taps, Py_ssize_t count,              \
                                  double *tile)                                                                        \
{                                                                                                                      \
    const int run = lanes == LANES ? side_by_side(other) : 1;                                                          \
    for (int r = 0; r < rows; r++, tile += LANES) {                                                                    \
        double sum[LANES] = {0};                                                                                       \
        for (Py_ssize_t k = 0; k < count; k++) {                                                                       \
            const float *line = pixels + (one[r] + taps[k]) * apart + taps[k];                                        \
            if (run == 16)                                                                                             \
                for (int lane = 0; lane < LANES; lane++)                                                               \
                    sum[lane] += line[other[0] + lane];                                                                \
            else if (run == 8)                                                                                         \
                for (int start = 0; start < LANES; start += 8)                                                         \
                    for (int lane = start; lane < start + 8; lane++)                                                   \
                        sum[lane] += line[other[start] + lane - start];                                                \
            else                                                                                                       \
                for (int lane = 0; lane < lanes; lane++)                                                               \
                    sum[lane] += line[other[lane]];                                                                    \
        }                                                                                                              \
        memcpy(tile, sum, sizeof sum);                                                                                 \
    }                                                                                                                  \
}                                                                                                                      \
                                                                                                                       \
/* met[0] += one . other, met[1] += |other| . (lengths of one), met[2] += |one| . (lengths of other), over a tile. */  \
FOR(KIND) static void met_##W(const double *one, const double *other, int rows, double weight, const double *down_one, \
                              const double *across_one, const double *down_other, const double *across_other,          \
                              double *met)                                                                             \
{                                                                                                                      \
    double sums[3][LANES] = {{0}};                                                                                     \
    for (int r = 0; r < rows; r++)                                                                                     \
        for (int lane = 0; lane < LANES; lane++) {                                                                     \
            double a = one[r * LANES + lane], b = other[r * LANES + lane];                                             \
            sums[0][lane] += a * b;                                                                                    \
            sums[1][lane] += fabs(b) * (down_one[r] * across_one[lane]);                                               \
            sums[2][lane] += fabs(a) * (down_other[r] * across_other[lane]);                                           \
        }                                                                                                              \
    for (int which = 0; which < 3; which++)                                                                            \
        for (int lane = 0; lane < LANES; lane++)                                                                       \
            met[which] += weight * sums[which][lane];                                                                  \
}

DEFINE("x86-64-v4", 16, 8)
DEFINE("x86-64-v3", 8, 4)

typedef struct {
    void (*tile)(const float *, const float *const *, const int64_t *, int, Py_ssize_t, int, float *);
    void (*pack)(const float *, const int64_t *, Py_ssize_t, const int64_t *, Py_ssize_t, float *);
    void (*add)(const float *, int, int, double *);
    void (*join)(const float *, int, float *);
    double (*place)(const float *, int, int, float *, Py_ssize_t, Py_ssize_t);
    void (*scatter)(const float *, const int64_t *, int, const int64_t *, int, int, float *, Py_ssize_t);
    void (*shifted)(const float *, Py_ssize_t, const int64_t *, int, const int64_t *, int, const int64_t *, Py_ssize_t,
                    double *);
    void (*met)(const double *, const double *, int, double, const double *, const double *, const double *, const double *,
                double *);
} instructions;

static const instructions WIDE = {tile_16, pack_16, add_16, join_16, place_16, scatter_16, shifted_16, met_16},
                          NARROW = {tile_8, pack_8, add_8, join_8, place_8, scatter_8, shifted_8, met_8};

/* The best that this processor has, or none; a virtual one with AVX2 may lack what else the compiler makes use of. */
static const instructions *found(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4"))
        return &WIDE;
    return __builtin_cpu_supports("x86-64-v3") ? &NARROW : NULL;
}

static inline Py_ssize_t panels_of(Py_ssize_t lanes)
{
    return (lanes + LANES - 1) / LANES;
}

static inline int rows_of(Py_ssize_t panel, Py_ssize_t lanes)
{
    return (int)(lanes - panel * LANES < LANES ? lanes - panel * LANES : LANES);
}

/* A row of an image; most are short, and it takes longer to call for them. */
static inline void copied_row(const float *from, Py_ssize_t step, Py_ssize_t size, float *to, Py_ssize_t apart)
{
    if (step != 1 || apart != 1)
        for (Py_ssize_t i = 0; i < size; i++)
            to[i * apart] = from[i * step];
    else if (size > 4 * LANES)
        memcpy(to, from, size * sizeof(float));
    else {
        Py_ssize_t i = 0;
        for (; i + 4 <= size; i += 4)
            memcpy(to + i, from + i, 4 * sizeof(float));
        for (; i < size; i++)
            to[i] = from[i];
    }
}

/* Where a matrix of one example and group lies: in an image, or in a copy of it, around which there are zeros already. */
static const float *placed(const operand *one, Py_ssize_t example, Py_ssize_t group, float *copy)
{
    const float *data = one->data + example * one->example + group * one->group;
    if (!one->room)
        return data;
    const int64_t *a = one->numbers + 1, *b = a + 3, *c = b + 3, *d = c + 3, *last = d + 3;
    for (Py_ssize_t i = 0; i < a[0]; i++)
        for (Py_ssize_t j = 0; j < b[0]; j++)
            for (Py_ssize_t k = 0; k < c[0]; k++) {
                const float *from = data + i * a[1] + j * b[1] + k * c[1];
                float *to = copy + one->numbers[0] + i * a[2] + j * b[2] + k * c[2];
                for (Py_ssize_t l = 0; l < d[0]; l++)
                    copied_row(from + l * d[1], last[1], last[0], to + l * d[2], last[2]);
            }
    return copy;
}

/* Zeroed memory for a copy, of the only operand that may need one. */
static float *room_for(const operand *one)
{
    const size_t size = Py_MAX(1, panels_of(one->room)) * LINE;
    float *copy = aligned_alloc(LINE, size);
    if (copy && one->room)
        memset(copy, 0, size);
    return copy;
}

/* So many lanes of a matrix in panels, of some depths: rows of columns, or the other way round. */
static void packed(const instructions *use, const float *data, const int64_t *lanes, Py_ssize_t count,
                   const int64_t *depths, Py_ssize_t depth, float *panels)
{
    for (Py_ssize_t p = 0; p < panels_of(count); p++)
        use->pack(data, lanes + p * LANES, rows_of(p, count), depths, depth, panels + p * LANES * depth);
}

/* Two panels that lie one after the other, and what is summed over in the order in which it lies. */
#define PAIR(panels, depth) ((const float *[]){(panels), (panels) + (depth) * LANES})
static int64_t in_order[BLOCK];

/* The lower half of a Gram matrix, added to tiles, one after another. */
static void gram_of_rows(const instructions *use, const operand *one, const float *data, Py_ssize_t positions,
                         float *panels, double *tiles, int first)
{
    const Py_ssize_t all = panels_of(positions);
    for (Py_ssize_t start = 0; start < one->width; start += BLOCK, first = 0) {
        Py_ssize_t depth = one->width - start < BLOCK ? one->width - start : BLOCK;
        packed(use, data, one->rows, positions, one->columns + start, depth, panels);
        double *total = tiles;
        for (Py_ssize_t q = 0; q < all; q += 2) {
            double *next = total + (all - q) * TILE;
            for (Py_ssize_t p = q; p < all; p++) {
                ALIGNED float tile[2 * TILE];
                const int rows = rows_of(p, positions), count = p > q ? 2 : 1;
                use->tile(panels + p * LANES * depth, PAIR(panels + q * LANES * depth, depth), in_order, count, depth, rows, tile);
                use->add(tile, rows, first, total + (p - q) * TILE);
                if (count == 2)
                    use->add(tile + TILE, rows, first, next + (p - q - 1) * TILE);
            }
            total = next + (all - q - 1) * TILE;
        }
    }
}

/* The same of windows: pixels are multiplied with each other once, into a matrix of which the lower half is filled, and
 * for each two windows its entries are added up along their taps. Later windows see later pixels. What pixels around the
 * image would be multiplied to is zero already; those within are summed in the order of whole tiles, as the first of more. */
static void gram_of_windows(const instructions *use, const operand *one, const float *data, Py_ssize_t positions,
                            float *panels, float *pixels, double *tiles)
{
    const Py_ssize_t seen = panels_of(one->row_count), apart = panels_of(one->pixels) * LANES;
    const Py_ssize_t all = panels_of(positions);
    for (Py_ssize_t start = 0; start < one->width; start += BLOCK) {
        Py_ssize_t depth = one->width - start < BLOCK ? one->width - start : BLOCK;
        packed(use, data, one->rows, one->row_count, one->columns + start, depth, panels);
        for (Py_ssize_t q = 0; q < seen; q += 2)
            for (Py_ssize_t p = q; p < seen; p++) {
                ALIGNED float tile[2 * TILE];
                const int rows = rows_of(p, one->row_count), count = p > q ? 2 : 1;
                use->tile(panels + p * LANES * depth, PAIR(panels + q * LANES * depth, depth), in_order, count, depth,
                          one->row_count < one->pixels ? (rows + 3) / 4 * 4 : rows, tile);
                for (int panel = 0; panel < count; panel++)
                    use->scatter(tile + panel * TILE, one->spots + p * LANES, rows, one->spots + (q + panel) * LANES,
                                 rows_of(q + panel, one->row_count), !start, pixels, apart);
            }
    }
    for (Py_ssize_t q = 0; q < all; q++)
        for (Py_ssize_t p = q; p < all; p++, tiles += TILE) {
            use->shifted(pixels, apart, one->where + p * LANES, rows_of(p, positions), one->where + q * LANES,
                         rows_of(q, positions), one->taps, one->tap_count, tiles);
            for (int r = 0; p == q && r < rows_of(p, positions); r++)
                for (int lane = r + 1; lane < LANES; lane++)
                    tiles[r * LANES + lane] = lane < rows_of(p, positions) ? tiles[lane * LANES + r] : 0;
        }
}

/* The lower half of the sum of the Gram matrices of some operands, tile by tile. */
static void gram(const instructions *use, const operand *operands, int count, Py_ssize_t example, Py_ssize_t group,
                 Py_ssize_t positions, float *panels, float *pixels, float *copy, double *tiles)
{
    for (const operand *one = operands; one < operands + count; one++) {
        const float *data = placed(one, example, group, copy);
        if (one->tap_count)
            gram_of_windows(use, one, data, positions, panels, pixels, tiles);
        else
            gram_of_rows(use, one, data, positions, panels, tiles, one == operands);
    }
}

/* How many spacings of float32 an entry of each Gram matrix errs by, and how many the weighted sum; and what squares that
 * vanished may come to before there is a doubt. */
typedef struct {
    double input, grad, sum, harmless;
} bounds;

typedef struct {
    double met2, input2, grad2, input_sum, grad_sum;
} lengths;

/* What outer.py's rounded_up does, with a closer bound on the error of the total. */
static double rounded_up(double total, double error, const lengths *l, double inputs, double outputs, const bounds *errs)
{
    const double eps = 0x1p-23, tiny = 0x1p-126, most = (2 - 0x1p-23) * 0x1p127;
    double exact = (total < 0 ? 0 : total) + eps * error + errs->sum * eps * l->met2;
    double hidden = tiny * (outputs * l->input_sum * l->input_sum + inputs * l->grad_sum * l->grad_sum);
    double left = (most / 256 - fmax(fmax(l->input2, l->grad2), l->met2)) / (most / 256 * 0.75);
    if (left <= 0)
        return INFINITY;
    if (hidden > 1e-7 * exact + errs->harmless)
        return NAN;
    return left < 1 ? exact / (left * left) : exact;
}

/* Lengths of positions from the diagonal of a Gram matrix; zero beyond the last, and what is not a number stays so. */
static void measure(const double *tiles, Py_ssize_t positions, double *to)
{
    const Py_ssize_t all = panels_of(positions);
    for (Py_ssize_t q = 0; q < all; tiles += (all - q) * TILE, q++)
        for (int r = 0; r < LANES; r++) {
            double square = r < rows_of(q, positions) ? tiles[r * LANES + r] : 0;
            to[q * LANES + r] = sqrt(square < 0 ? 0 : square);
        }
}

static void add_lengths(const double *inputs, const double *grads, Py_ssize_t positions, lengths *l)
{
    double met = 0;
    for (Py_ssize_t at = 0; at < positions; at++) {
        met += inputs[at] * grads[at];
        l->input2 += inputs[at] * inputs[at], l->grad2 += grads[at] * grads[at];
        l->input_sum += inputs[at], l->grad_sum += grads[at];
    }
    l->met2 += met * met;
}

/* Threads take examples until none is left. */
typedef struct {
    const instructions *use;
    operand inputs[MOST_OPERANDS], grads[MOST_OPERANDS];
    int input_count, grad_count, squared, failed;
    Py_ssize_t stop, groups, positions;
    bounds errs;
    float *out;
    double *norm2;
    ALIGNED Py_ssize_t next;
} problem;

static inline Py_ssize_t taken(problem *all)
{
    return __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
}

/* An entry <x_s, x_t> errs by so many spacings of |x_s| |x_t|, and is multiplied by <g_s, g_t>: the error of the total is
 * at most the sum of |x_s| |x_t| |<g_s, g_t>|, and the same the other way round. */
static int gram_norm2(problem *all)
{
    const Py_ssize_t count = panels_of(all->positions), tiles = count * (count + 1) / 2;
    const Py_ssize_t seen = Py_MAX(count, panels_of(all->inputs->pixels));
    const size_t square = seen * seen * TILE * sizeof(float);
    const int in_windows = all->inputs->tap_count > 0;
    double inputs = 0, outputs = 0;
    for (int i = 0; i < all->input_count; i++)
        inputs += (double)all->inputs[i].width * Py_MAX(1, all->inputs[i].tap_count);
    for (int i = 0; i < all->grad_count; i++)
        outputs += all->grads[i].width;
    float *panels = aligned_alloc(LINE, seen * BLOCK * LINE);
    float *pixels = aligned_alloc(LINE, in_windows ? square : LINE), *copy = room_for(all->inputs);
    double *input = aligned_alloc(LINE, (2 * tiles * TILE + 2 * count * LANES) * sizeof(double));
    const int fits = panels && pixels && copy && input;
    double *grad = input + tiles * TILE, *input_length = grad + tiles * TILE;
    double *grad_length = input_length + count * LANES;
    if (fits && all->inputs->row_count < all->inputs->pixels)
        memset(pixels, 0, square);
    for (Py_ssize_t example; fits && (example = taken(all)) < all->stop;) {
        lengths l = {0};
        double met[3] = {0};
        for (Py_ssize_t group = 0; group < all->groups; group++) {
            gram(all->use, all->inputs, all->input_count, example, group, all->positions, panels, pixels, copy, input);
            gram(all->use, all->grads, all->grad_count, example, group, all->positions, panels, pixels, copy, grad);
            measure(input, all->positions, input_length);
            measure(grad, all->positions, grad_length);
            add_lengths(input_length, grad_length, all->positions, &l);
            Py_ssize_t at = 0;
            for (Py_ssize_t q = 0; q < count; q++)
                for (Py_ssize_t p = q; p < count; p++, at += TILE)
                    all->use->met(input + at, grad + at, rows_of(p, all->positions), p == q ? 1 : 2,
                                  input_length + p * LANES, input_length + q * LANES, grad_length + p * LANES,
                                  grad_length + q * LANES, met);
        }
        double error = all->errs.input * met[1] + all->errs.grad * met[2];
        all->norm2[example] = rounded_up(met[0], error, &l, inputs, outputs, &all->errs);
    }
    free(panels), free(pixels), free(copy), free(input);
    return fits;
}

/* All pixels of an image in panels of channels, each at its spot; what is around the image stays zero. */
static void packed_pixels(const instructions *use, const operand *one, const float *data, float *panels)
{
    for (Py_ssize_t start = 0, stop; start < one->row_count; start = stop) {
        for (stop = start + 1; stop < one->row_count && one->spots[stop] == one->spots[stop - 1] + 1; stop++)
            ;
        for (Py_ssize_t p = 0; p < panels_of(one->width); p++)
            use->pack(data, one->columns + p * LANES, rows_of(p, one->width), one->rows + start, stop - start,
                      panels + (p * one->pixels + one->spots[start]) * LANES);
    }
}

/* out[example][group] = grad^T input, positions in blocks: the panels of one stay in the cache. What windows that are told
 * by pixels see under one tap are the pixels from there on: these are packed once for all taps. */
static int products(problem *all)
{
    const operand *input = all->inputs, *grad = all->grads;
    const int told = input->tap_count > 0;
    const Py_ssize_t taps = told ? input->tap_count : 1, width = input->width * taps;
    const Py_ssize_t beside = panels_of(input->width), across = beside * taps, down = panels_of(grad->width);
    const size_t seen = beside * (told ? input->pixels : BLOCK) * LINE;
    float *lefts = aligned_alloc(LINE, down * BLOCK * LINE), *rights = aligned_alloc(LINE, seen);
    float *sums = aligned_alloc(LINE, across * down * TILE * sizeof(float)), *copy = room_for(input);
    const int fits = lefts && rights && sums && copy;
    if (fits && input->row_count < input->pixels)
        memset(rights, 0, seen);
    for (Py_ssize_t example; fits && (example = taken(all)) < all->stop;) {
        all->norm2[example] = 0;
        for (Py_ssize_t group = 0; group < all->groups; group++) {
            const float *left = placed(grad, example, group, NULL), *right = placed(input, example, group, copy);
            float *to = all->out + (example * all->groups + group) * grad->width * width;
            if (told)
                packed_pixels(all->use, input, right, rights);
            for (Py_ssize_t start = 0; start < all->positions; start += BLOCK) {
                const Py_ssize_t depth = all->positions - start < BLOCK ? all->positions - start : BLOCK;
                packed(all->use, left, grad->columns, grad->width, grad->rows + start, depth, lefts);
                if (!told)
                    packed(all->use, right, input->columns, input->width, input->rows + start, depth, rights);
                for (Py_ssize_t q = 0; q < across; q += 2) {
                    const int count = q + 1 < across ? 2 : 1;
                    const float *pair[2];
                    for (Py_ssize_t i = q; i < q + count; i++)
                        pair[i - q] = rights + LANES * (told ? i / taps * input->pixels + input->taps[i % taps] : i * depth);
                    float *sum = sums + q * down * TILE;
                    for (Py_ssize_t p = 0; p < down; p++, sum += count * TILE) {
                        ALIGNED float tile[2 * TILE];
                        const int rows = rows_of(p, grad->width);
                        all->use->tile(lefts + p * LANES * depth, pair, told ? input->where + start : in_order, count,
                                       depth, rows, start ? tile : sum);
                        for (int panel = 0; start && panel < count; panel++)
                            all->use->join(tile + panel * TILE, rows, sum + panel * TILE);
                    }
                }
            }
            for (Py_ssize_t p = 0; p < down; p++)
                for (Py_ssize_t q = 0; q < across; q++) {
                    const Py_ssize_t even = q & ~1, count = even + 1 < across ? 2 : 1;
                    all->norm2[example] += all->use->place(
                        sums + (even * down + p * count + q - even) * TILE, rows_of(p, grad->width),
                        rows_of(q / taps, input->width), to + p * LANES * width + q / taps * LANES * taps + q % taps,
                        width, taps);
                }
        }
    }
    free(lefts), free(rights), free(sums), free(copy);
    return fits;
}

/* What one thread does. */
static void worked(void *data)
{
    problem *all = data;
    if (!(all->squared ? gram_norm2(all) : products(all)))
        __atomic_store_n(&all->failed, 1, __ATOMIC_RELAXED);
}

/* Operands come as (address, stride of examples, stride of groups, width; of windows that are told by pixels how many rows,
 * pixels and taps there are; the room of a copy; the addresses of rows, columns, numbers, where, taps, spots), with zeros
 * for what there is not. Windows that are copied or told by pixels come alone. */
static int read_operands(PyObject *list, operand *to, int *count, int may_be_windows)
{
    Py_ssize_t size = PyTuple_Check(list) ? PyTuple_GET_SIZE(list) : -1;
    if (size < 1 || size > MOST_OPERANDS) {
        PyErr_Format(PyExc_ValueError, "operands: a tuple of 1 to %d", MOST_OPERANDS);
        return 0;
    }
    for (Py_ssize_t i = 0; i < size; i++) {
        Py_ssize_t data, rows, columns, where, taps, spots, numbers;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(list, i), "nnnnnnnnnnnnnn", &data, &to[i].example, &to[i].group,
                              &to[i].width, &to[i].row_count, &to[i].pixels, &to[i].tap_count, &to[i].room, &rows,
                              &columns, &numbers, &where, &taps, &spots))
            return 0;
        const int is_windows = to[i].tap_count || to[i].room;
        if (is_windows && (!may_be_windows || size > 1)) {
            PyErr_SetString(PyExc_ValueError, "windows are the only operand of the inputs");
            return 0;
        }
        to[i].where = (const int64_t *)where, to[i].taps = (const int64_t *)taps, to[i].spots = (const int64_t *)spots;
        to[i].data = (const float *)data, to[i].rows = (const int64_t *)rows, to[i].columns = (const int64_t *)columns;
        to[i].numbers = (const int64_t *)numbers;
    }
    *count = (int)size;
    return 1;
}

static int read_problem(PyObject *inputs, PyObject *grads, int narrow, problem *all)
{
    all->use = narrow ? &NARROW : found();
    if (found() == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "this processor has no vectors of eight numbers: is_there() says so");
        return 0;
    }
    return read_operands(inputs, all->inputs, &all->input_count, 1) && read_operands(grads, all->grads, &all->grad_count, 0);
}

static PyObject *call(PyObject *arguments, int squared)
{
    PyObject *inputs, *grads;
    problem all = {.squared = squared};
    Py_ssize_t out, norm2, threads, enter;
    int narrow;
    if (!PyArg_ParseTuple(arguments, "OOnn(dddd)nnpnnnn", &inputs, &grads, &all.groups, &all.positions, &all.errs.input,
                          &all.errs.grad, &all.errs.sum, &all.errs.harmless, &out, &norm2, &narrow, &all.next, &all.stop,
                          &threads, &enter)
        || !read_problem(inputs, grads, narrow, &all))
        return NULL;
    all.out = (float *)out, all.norm2 = (double *)norm2;
    Py_BEGIN_ALLOW_THREADS
    together(worked, &all, threads, enter);
    Py_END_ALLOW_THREADS
    if (all.failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}
#endif

static PyObject *is_there(PyObject *module, PyObject *none)
{
#if SEVERAL_PROCESSORS
    return PyBool_FromLong(found() != NULL);
#else
    Py_RETURN_FALSE;
#endif
}

#if SEVERAL_PROCESSORS
static PyObject *call_gram(PyObject *module, PyObject *arguments)
{
    return call(arguments, 1);
}

static PyObject *call_products(PyObject *module, PyObject *arguments)
{
    return call(arguments, 0);
}
#endif

static PyMethodDef methods[] = {
    {"is_there", is_there, METH_NOARGS, "Whether this processor has the vectors that the others need."},
#if SEVERAL_PROCESSORS
    {"gram_norm2", call_gram, METH_VARARGS, "Squared norms by Gram matrices."},
    {"products", call_products, METH_VARARGS, "Products for each example, and their squared norms."},
#endif
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_panels", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__panels(void)
{
#if SEVERAL_PROCESSORS
    for (int i = 0; i < BLOCK; i++)
        in_order[i] = i;
#endif
    return PyModule_Create(&definition);
}
