/* Gradients of the scale and the shift of a normalisation, sums over positions: what scales.py describes.
 *
 * Memory sets the pace. Positions are read in order, eight at once: sixteen streams, which a processor foresees, and
 * the sums of a column are loaded and stored once for all eight. Eight positions are added up in registers, those of a
 * block in float32, and blocks in double precision, column by column: a column's sum is the same whichever are beside it.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../_vectors.h"
#include "_team.h"

enum { COLUMNS = 1024, TOGETHER = 8, BLOCK = 128 };

typedef float vector_16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float vector_8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vector_4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vector_1;

/* Contiguous: input and grad (rows, positions, width), mean and rstd (rows, positions), the sums (rows, width). */
typedef struct {
    const float *input, *grad, *mean, *rstd;
    float *scale, *shift;
    Py_ssize_t positions, width, next, stop;
    void (*of)(const void *all, Py_ssize_t row, Py_ssize_t first, Py_ssize_t columns);
} problem;

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
    FOR static void rows_##N##_##W(const problem *all, Py_ssize_t at, Py_ssize_t first, Py_ssize_t columns,            \
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
#define DEFINE(FOR, W)                                                                                                 \
    DEFINE_ROWS(FOR, W, 8)                                                                                             \
    DEFINE_ROWS(FOR, W, 1)                                                                                             \
    FOR static void sums_##W(const void *data, Py_ssize_t row, Py_ssize_t first, Py_ssize_t columns)                   \
    {                                                                                                                  \
        const problem *all = data;                                                                                     \
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
    }

typedef void (*sums)(const void *all, Py_ssize_t row, Py_ssize_t first, Py_ssize_t columns);

DEFINE(, 4)
#if SEVERAL_PROCESSORS
DEFINE(__attribute__((target("arch=x86-64-v4"))), 16)
DEFINE(__attribute__((target("arch=x86-64-v3"))), 8)
#endif

/* The best that this processor has, of vectors of no more than so many numbers. */
static sums found(int widest)
{
#if SEVERAL_PROCESSORS
    __builtin_cpu_init();
    if (widest >= 16 && __builtin_cpu_supports("x86-64-v4"))
        return sums_16;
    if (widest >= 8 && __builtin_cpu_supports("x86-64-v3"))
        return sums_8;
#endif
    return sums_4;
}

/* What each thread does: one row after another that no other has. */
static void worked(void *data)
{
    problem *all = data;
    Py_ssize_t row;
    while ((row = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < all->stop)
        for (Py_ssize_t column = 0; column < all->width; column += COLUMNS)
            all->of(all, row, column, Py_MIN(COLUMNS, all->width - column));
}

/* Arguments: the problem, the widest vector, rows from start to stop, threads, and the address of GOMP_parallel. */
static PyObject *scale_grads(PyObject *module, PyObject *arguments)
{
    problem all;
    Py_ssize_t input, grad, mean, rstd, scale, shift, enter;
    int widest, threads;
    if (!PyArg_ParseTuple(arguments, "(nnnnnnnn)innin", &input, &grad, &mean, &rstd, &scale, &shift, &all.positions,
                          &all.width, &widest, &all.next, &all.stop, &threads, &enter))
        return NULL;
    all.of = found(widest);
    all.input = (const float *)input, all.grad = (const float *)grad;
    all.mean = (const float *)mean, all.rstd = (const float *)rstd;
    all.scale = (float *)scale, all.shift = (float *)shift;
    Py_BEGIN_ALLOW_THREADS
    together(worked, &all, threads, enter);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"scale_grads", scale_grads, METH_VARARGS, "Gradients of the scale and the shift of a normalisation."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_affine", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__affine(void)
{
    return PyModule_Create(&definition);
}
