/* Gradients of the scale and the shift of a normalisation, for each example: what scales.py describes.
 *
 * Memory sets the pace. Positions of a layer norm are read in order, eight at once: sixteen streams, which a processor
 * foresees, and the sums of a column are loaded and stored once for all eight. Eight positions are added up in registers,
 * those of a block in float32, and blocks in double precision, column by column: a column's sum is the same whichever are
 * beside it. Of a group norm each group is read for its sums, and again, out of the cache, for the gradient of its input.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../_vectors.h"
#include "_team.h"

enum { COLUMNS = 1024, TOGETHER = 8, BLOCK = 128, LINE = 2048, BESIDE = 4 };

typedef float vector_16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float vector_8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vector_4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vector_1;

/* Contiguous: input and grad (rows, positions, width), mean and rstd (rows, positions), the sums (rows, width). */
typedef struct {
    const float *input, *grad, *mean, *rstd;
    float *scale, *shift;
    Py_ssize_t positions, width;
} layers;

/* The same: input, grad and input_grad, which may be left out, (units, channels, pixels), mean and rstd (units,), the sums
 * (units, channels), and the scale (groups, channels), where a unit is a group of a row. */
typedef struct {
    const float *input, *grad, *mean, *rstd, *weight;
    float *input_grad, *scale, *shift;
    Py_ssize_t groups, channels, pixels;
} groups;

/* Threads take one unit of work after another that no other has. */
typedef struct {
    void (*done)(const void *problem, Py_ssize_t unit);
    const void *problem;
    Py_ssize_t next, stop;
} work;

/* The sums of N positions from `at` on, added to those of a block, by vectors of W numbers as long as they fit. */
#define ADD(W, N)                                                                                                      \
    for (; c + W <= columns; c += W) {                                                                                 \
        vector_##W scale = {0}, shift = {0};                                                                           \
        for (int r = 0; r < N; r++) {                                                                                  \
            vector_##W one = *(const vector_##W *)(input + r * all->width + c);                                        \
            vector_##W two = *(const vector_##W *)(grad + r * all->width + c);                                         \
            scale += two * ((one - mean[r]) * rstd[r]);                                                                \
            shift += two;                                                                                              \
        }                                                                                                              \
        *(vector_##W *)(scales + c) += scale;                                                                          \
        *(vector_##W *)(shifts + c) += shift;                                                                          \
    }

#define DEFINE_ROWS(FOR, W, N)                                                                                         \
    FOR static void rows_##N##_##W(const layers *all, Py_ssize_t at, Py_ssize_t first, Py_ssize_t columns,            \
                                   float *scales, float *shifts)                                                       \
    {                                                                                                                  \
        const float *input = all->input + at * all->width + first, *grad = all->grad + at * all->width + first;        \
        const float *mean = all->mean + at, *rstd = all->rstd + at;                                                    \
        Py_ssize_t c = 0;                                                                                              \
        ADD(W, N)                                                                                                      \
        ADD(4, N)                                                                                                      \
        ADD(1, N)                                                                                                      \
    }

/* At most COLUMNS columns of one row of the sums. */
#define DEFINE_LAYERS(FOR, W)                                                                                          \
    DEFINE_ROWS(FOR, W, 8)                                                                                             \
    DEFINE_ROWS(FOR, W, 1)                                                                                             \
    FOR static void columns_##W(const layers *all, Py_ssize_t row, Py_ssize_t first, Py_ssize_t columns)               \
    {                                                                                                                  \
        double scale_total[COLUMNS], shift_total[COLUMNS];                                                             \
        float scales[COLUMNS], shifts[COLUMNS];                                                                        \
        for (Py_ssize_t c = 0; c < columns; c++)                                                                       \
            scale_total[c] = shift_total[c] = 0;                                                                       \
        for (Py_ssize_t start = 0; start < all->positions; start += BLOCK) {                                           \
            const Py_ssize_t end = row * all->positions + Py_MIN(start + BLOCK, all->positions);                       \
            Py_ssize_t at = row * all->positions + start;                                                              \
            for (Py_ssize_t c = 0; c < columns; c++)                                                                   \
                scales[c] = shifts[c] = 0;                                                                             \
            for (; at + TOGETHER <= end; at += TOGETHER)                                                               \
                rows_8_##W(all, at, first, columns, scales, shifts);                                                   \
            for (; at < end; at++)                                                                                     \
                rows_1_##W(all, at, first, columns, scales, shifts);                                                   \
            for (Py_ssize_t c = 0; c < columns; c++)                                                                   \
                scale_total[c] += scales[c], shift_total[c] += shifts[c];                                              \
        }                                                                                                              \
        for (Py_ssize_t c = 0; c < columns; c++) {                                                                     \
            all->scale[row * all->width + first + c] = (float)scale_total[c];                                          \
            all->shift[row * all->width + first + c] = (float)shift_total[c];                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    FOR static void layers_##W(const void *problem, Py_ssize_t row)                                                    \
    {                                                                                                                  \
        const layers *all = problem;                                                                                   \
        for (Py_ssize_t column = 0; column < all->width; column += COLUMNS)                                            \
            columns_##W(all, row, column, Py_MIN(COLUMNS, all->width - column));                                       \
    }

/* The sums over a line of pixels, in vectors side by side, and then the gradients of the inputs of a group. */
#define DEFINE_GROUPS(FOR, W)                                                                                          \
    FOR static float total_##W(vector_##W lanes)                                                                       \
    {                                                                                                                  \
        for (int half = W / 2; half; half /= 2)                                                                        \
            for (int lane = 0; lane < half; lane++)                                                                    \
                lanes[lane] += lanes[lane + half];                                                                     \
        return lanes[0];                                                                                               \
    }                                                                                                                  \
                                                                                                                       \
    FOR static void line_##W(const float *input, const float *grad, Py_ssize_t count, float mean, float rstd,          \
                             double *scale, double *shift)                                                             \
    {                                                                                                                  \
        for (Py_ssize_t at = 0, end; at < count; at = end) {                                                           \
            vector_##W scales[BESIDE] = {{0}}, shifts[BESIDE] = {{0}};                                                 \
            float scale_left = 0, shift_left = 0;                                                                      \
            end = Py_MIN(at + LINE, count);                                                                            \
            for (int beside = BESIDE; beside > 0; beside -= BESIDE - 1)                                                \
                for (; at + beside * W <= end; at += beside * W)                                                       \
                    for (int v = 0; v < beside; v++) {                                                                 \
                        vector_##W one = *(const vector_##W *)(input + at + v * W);                                    \
                        vector_##W two = *(const vector_##W *)(grad + at + v * W);                                     \
                        scales[v] += two * ((one - mean) * rstd);                                                      \
                        shifts[v] += two;                                                                              \
                    }                                                                                                  \
            for (; at < end; at++) {                                                                                   \
                scale_left += grad[at] * ((input[at] - mean) * rstd);                                                  \
                shift_left += grad[at];                                                                                \
            }                                                                                                          \
            *scale += total_##W((scales[0] + scales[1]) + (scales[2] + scales[3])) + scale_left;                       \
            *shift += total_##W((shifts[0] + shifts[1]) + (shifts[2] + shifts[3])) + shift_left;                       \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    FOR static void groups_##W(const void *problem, Py_ssize_t unit)                                                   \
    {                                                                                                                  \
        const groups *all = problem;                                                                                   \
        const Py_ssize_t pixels = all->pixels, first = unit * all->channels;                                           \
        const float mean = all->mean[unit], rstd = all->rstd[unit];                                                    \
        const float *weight = all->weight + unit % all->groups * all->channels;                                        \
        double steep = 0, level = 0;                                                                                   \
        for (Py_ssize_t c = 0; c < all->channels; c++) {                                                               \
            double scale = 0, shift = 0;                                                                               \
            line_##W(all->input + (first + c) * pixels, all->grad + (first + c) * pixels, pixels, mean, rstd, &scale,  \
                     &shift);                                                                                          \
            all->scale[first + c] = (float)scale, all->shift[first + c] = (float)shift;                                \
            steep += weight[c] * scale, level += weight[c] * shift;                                                    \
        }                                                                                                              \
        const float slope = (float)(steep / ((double)all->channels * pixels) * rstd) * rstd;                           \
        const float floor = (float)(level / ((double)all->channels * pixels) * rstd);                                  \
        for (Py_ssize_t c = 0; all->input_grad && c < all->channels; c++) {                                            \
            const float *input = all->input + (first + c) * pixels, *grad = all->grad + (first + c) * pixels;          \
            float *to = all->input_grad + (first + c) * pixels;                                                        \
            const float share = rstd * weight[c];                                                                      \
            INDEPENDENT                                                                                                \
            for (Py_ssize_t i = 0; i < pixels; i++)                                                                    \
                to[i] = share * grad[i] - (slope * (input[i] - mean) + floor);                                         \
        }                                                                                                              \
    }

#define DEFINE(FOR, W) DEFINE_LAYERS(FOR, W) DEFINE_GROUPS(FOR, W)

DEFINE(, 4)
#if SEVERAL_PROCESSORS
DEFINE(__attribute__((target("arch=x86-64-v4"))), 16)
DEFINE(__attribute__((target("arch=x86-64-v3"))), 8)
#endif

typedef struct {
    void (*layers)(const void *problem, Py_ssize_t row), (*groups)(const void *problem, Py_ssize_t unit);
} instructions;

/* The best that this processor has, of vectors of no more than so many numbers. */
static instructions found(int widest)
{
#if SEVERAL_PROCESSORS
    __builtin_cpu_init();
    if (widest >= 16 && __builtin_cpu_supports("x86-64-v4"))
        return (instructions){layers_16, groups_16};
    if (widest >= 8 && __builtin_cpu_supports("x86-64-v3"))
        return (instructions){layers_8, groups_8};
#endif
    return (instructions){layers_4, groups_4};
}

/* What each thread does. */
static void worked(void *data)
{
    work *all = data;
    Py_ssize_t unit;
    while ((unit = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < all->stop)
        all->done(all->problem, unit);
}

/* Arguments: the problem, the widest vector, units from start to stop, threads, and the address of GOMP_parallel. */
static PyObject *scale_grads(PyObject *module, PyObject *arguments)
{
    layers all;
    work share = {.problem = &all};
    Py_ssize_t input, grad, mean, rstd, scale, shift, enter;
    int widest, threads;
    if (!PyArg_ParseTuple(arguments, "(nnnnnnnn)innin", &input, &grad, &mean, &rstd, &scale, &shift, &all.positions,
                          &all.width, &widest, &share.next, &share.stop, &threads, &enter))
        return NULL;
    share.done = found(widest).layers;
    all.input = (const float *)input, all.grad = (const float *)grad;
    all.mean = (const float *)mean, all.rstd = (const float *)rstd;
    all.scale = (float *)scale, all.shift = (float *)shift;
    Py_BEGIN_ALLOW_THREADS
    together(worked, &share, threads, enter);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* The same. */
static PyObject *group_grads(PyObject *module, PyObject *arguments)
{
    groups all;
    work share = {.problem = &all};
    Py_ssize_t input, grad, mean, rstd, weight, input_grad, scale, shift, enter;
    int widest, threads;
    if (!PyArg_ParseTuple(arguments, "(nnnnnnnnnnn)innin", &input, &grad, &mean, &rstd, &weight, &input_grad, &scale,
                          &shift, &all.groups, &all.channels, &all.pixels, &widest, &share.next, &share.stop, &threads,
                          &enter))
        return NULL;
    share.done = found(widest).groups;
    all.input = (const float *)input, all.grad = (const float *)grad, all.weight = (const float *)weight;
    all.mean = (const float *)mean, all.rstd = (const float *)rstd;
    all.input_grad = (float *)input_grad, all.scale = (float *)scale, all.shift = (float *)shift;
    Py_BEGIN_ALLOW_THREADS
    together(worked, &share, threads, enter);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"scale_grads", scale_grads, METH_VARARGS, "Gradients of the scale and the shift of a layer norm."},
    {"group_grads", group_grads, METH_VARARGS, "All gradients of a group norm."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_affine", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__affine(void)
{
    return PyModule_Create(&definition);
}
