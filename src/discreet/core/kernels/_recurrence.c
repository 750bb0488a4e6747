/* Recurrent layers, all steps of time in one call: what recurrence.py describes.
 *
 * Rows are examples, and never meet: each thread takes its own through all steps. A matrix comes in panels of 32 of its
 * columns, so that a product reads it in order, and from the cache where it fits. A number is summed in the same order
 * whichever rows are beside it.
 *
 * exp and tanh are Cephes' polynomials (S. Moshier, expf.c and tanhf.c), below two units in the last place. The loops
 * are written so that the compiler turns them into vector code, for several generations of x86-64.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "../_vectors.h"

enum { COLUMNS = 32, BLOCK = 256 };

typedef float vector_16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float vector_8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vector_4 __attribute__((vector_size(16), aligned(4), may_alias));

/* ---------------------------------------------------------------------------------------------------- the product */

/* out[r][c] += sum over p of value[r][p] * panel[p][c], for N rows and at most 32 columns, by vectors of W numbers. */
#define DEFINE_ROWS(FOR, W, N)                                                                                         \
    FOR static void rows_##N##_##W(const float *value, Py_ssize_t apart, const float *panel, Py_ssize_t depth,         \
                                   float *out, Py_ssize_t out_apart, Py_ssize_t columns)                               \
    {                                                                                                                  \
        enum { VECTORS = COLUMNS / W };                                                                                \
        vector_##W sum[N][VECTORS] = {{{0}}};                                                                          \
        for (Py_ssize_t p = 0; p < depth; p++)                                                                         \
            for (int v = 0; v < VECTORS; v++) {                                                                        \
                vector_##W right = *(const vector_##W *)(panel + p * COLUMNS + v * W);                                 \
                for (int r = 0; r < N; r++)                                                                            \
                    sum[r][v] += value[r * apart + p] * right;                                                         \
            }                                                                                                          \
        for (int r = 0; r < N; r++) {                                                                                  \
            float *to = out + r * out_apart;                                                                           \
            if (columns == COLUMNS)                                                                                    \
                for (int v = 0; v < VECTORS; v++)                                                                      \
                    *(vector_##W *)(to + v * W) += sum[r][v];                                                          \
            else                                                                                                       \
                for (Py_ssize_t c = 0; c < columns; c++)                                                               \
                    to[c] += sum[r][c / W][c % W];                                                                     \
        }                                                                                                              \
    }

#define DEFINE(FOR, W, WIDEST)                                                                                         \
    DEFINE_ROWS(FOR, W, WIDEST)                                                                                        \
    DEFINE_ROWS(FOR, W, 1)                                                                                             \
    FOR static void product_##W(const float *value, Py_ssize_t rows, const float *panels, Py_ssize_t depth,            \
                                float *out, Py_ssize_t columns)                                                        \
    {                                                                                                                  \
        for (Py_ssize_t at = 0; at < columns; at += COLUMNS, panels += depth * COLUMNS)                                \
            for (Py_ssize_t start = 0; start < depth; start += BLOCK) {                                                \
                Py_ssize_t some = Py_MIN(BLOCK, depth - start), wide = Py_MIN(COLUMNS, columns - at), r = 0;           \
                const float *from = value + start, *panel = panels + start * COLUMNS;                                  \
                for (; r + WIDEST <= rows; r += WIDEST)                                                                \
                    rows_##WIDEST##_##W(from + r * depth, depth, panel, some, out + r * columns + at, columns, wide);  \
                for (; r < rows; r++)                                                                                  \
                    rows_1_##W(from + r * depth, depth, panel, some, out + r * columns + at, columns, wide);           \
            }                                                                                                          \
    }

/* out (rows, columns) += value (rows, depth) times a matrix in panels (columns / 32, depth, 32). */
typedef void (*product)(const float *value, Py_ssize_t rows, const float *panels, Py_ssize_t depth, float *out,
                        Py_ssize_t columns);

DEFINE(, 4, 2)
#if SEVERAL_PROCESSORS
DEFINE(__attribute__((target("arch=x86-64-v4"))), 16, 8)
DEFINE(__attribute__((target("arch=x86-64-v3"))), 8, 2)
#endif

/* The best that this processor has, of vectors of no more than so many numbers. */
static product found(int widest)
{
#if SEVERAL_PROCESSORS
    __builtin_cpu_init();
    if (widest >= 16 && __builtin_cpu_supports("x86-64-v4"))
        return product_16;
    if (widest >= 8 && __builtin_cpu_supports("x86-64-v3"))
        return product_8;
#endif
    return product_4;
}

/* ------------------------------------------------------------------------------------------------------- the gates */

/* Comparisons are written so that what is not a number stays so. */
static inline float exponential(float x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

static inline float hyperbolic_tangent(float x)
{
    float z = x * x, size = x < 0 ? -x : x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    float near = p * z * x + x;
    float far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    far = x < 0 ? -far : far;
    return size < 0.625f ? near : far;
}

/* Each of these is one example at one step. Gates of an LSTM: in, forget, candidate, out; of a GRU: reset, update,
 * candidate. A forward has what enters them before, and what leaves them after. */
FOR_EVERY_PROCESSOR
static void lstm_step(float *gates, const float *before, float *cell, float *squashed, float *state, Py_ssize_t width)
{
    float *in = gates, *forget = gates + width, *candidate = gates + 2 * width, *out = gates + 3 * width;
    INDEPENDENT
    for (Py_ssize_t h = 0; h < width; h++) {
        float i = sigmoid(in[h]), f = sigmoid(forget[h]), g = hyperbolic_tangent(candidate[h]), o = sigmoid(out[h]);
        float c = f * before[h] + i * g, q = hyperbolic_tangent(c);
        in[h] = i, forget[h] = f, candidate[h] = g, out[h] = o;
        cell[h] = c, squashed[h] = q, state[h] = o * q;
    }
}

/* Gradients at the gates, from those of the state and of the cell; the latter becomes that of the step before. */
FOR_EVERY_PROCESSOR
static void lstm_back(const float *gates, const float *before, const float *squashed, const float *state_grad,
                      float *cell_grad, float *gate_grads, Py_ssize_t width)
{
    const float *in = gates, *forget = gates + width, *candidate = gates + 2 * width, *out = gates + 3 * width;
    float *in_grad = gate_grads, *forget_grad = gate_grads + width, *candidate_grad = gate_grads + 2 * width;
    float *out_grad = gate_grads + 3 * width;
    INDEPENDENT
    for (Py_ssize_t h = 0; h < width; h++) {
        float i = in[h], f = forget[h], g = candidate[h], o = out[h], q = squashed[h], s = state_grad[h];
        float c = cell_grad[h] + s * o * (1.0f - q * q);
        in_grad[h] = c * g * i * (1.0f - i);
        forget_grad[h] = c * before[h] * f * (1.0f - f);
        candidate_grad[h] = c * i * (1.0f - g * g);
        out_grad[h] = s * q * o * (1.0f - o);
        cell_grad[h] = c * f;
    }
}

/* What comes from the state enters the candidate by way of the reset gate; it is kept. */
FOR_EVERY_PROCESSOR
static void gru_step(float *gates, const float *recurrent, const float *before, float *kept, float *state,
                     Py_ssize_t width)
{
    float *reset = gates, *update = gates + width, *candidate = gates + 2 * width;
    INDEPENDENT
    for (Py_ssize_t h = 0; h < width; h++) {
        float r = sigmoid(reset[h] + recurrent[h]), z = sigmoid(update[h] + recurrent[width + h]);
        float inner = recurrent[2 * width + h], n = hyperbolic_tangent(candidate[h] + r * inner);
        reset[h] = r, update[h] = z, candidate[h] = n, kept[h] = inner;
        state[h] = n + z * (before[h] - n);
    }
}

/* Gradients at the gates, of what comes from the input and of what comes from the state. The state's gradient becomes
 * the part of it that goes on to the step before past all gates. */
FOR_EVERY_PROCESSOR
static void gru_back(const float *gates, const float *kept, const float *before, float *state_grad, float *input_grads,
                     float *hidden_grads, Py_ssize_t width)
{
    const float *reset = gates, *update = gates + width, *candidate = gates + 2 * width;
    float *reset_grad = hidden_grads, *update_grad = hidden_grads + width, *inner_grad = hidden_grads + 2 * width;
    float *candidate_grad = input_grads + 2 * width;
    INDEPENDENT
    for (Py_ssize_t h = 0; h < width; h++) {
        float r = reset[h], z = update[h], n = candidate[h], s = state_grad[h];
        float c = s * (1.0f - z) * (1.0f - n * n);
        float at_reset = c * kept[h] * r * (1.0f - r), at_update = s * (before[h] - n) * z * (1.0f - z);
        candidate_grad[h] = c, inner_grad[h] = c * r;
        reset_grad[h] = at_reset, update_grad[h] = at_update;
        input_grads[h] = at_reset, input_grads[width + h] = at_update;
        state_grad[h] = s * z;
    }
}

FOR_EVERY_PROCESSOR
static void elman_step(float *state, Py_ssize_t width, int relu)
{
    INDEPENDENT
    for (Py_ssize_t h = 0; h < width; h++)
        state[h] = relu ? (state[h] < 0 ? 0 : state[h]) : hyperbolic_tangent(state[h]);
}

FOR_EVERY_PROCESSOR
static void elman_back(const float *state, const float *state_grad, float *gate_grad, Py_ssize_t width, int relu)
{
    INDEPENDENT
    for (Py_ssize_t h = 0; h < width; h++)
        gate_grad[h] = state_grad[h] * (relu ? (state[h] > 0 ? 1.0f : 0.0f) : 1.0f - state[h] * state[h]);
}

/* ------------------------------------------------------------------------------------------- layers over all steps */

/* Tensors are (steps, rows, numbers) and contiguous, but for the gradients of the outputs. */
typedef struct {
    Py_ssize_t steps, rows, start, stop; /* of the rows, those from start to stop are met */
} extent;

static inline float *at(Py_ssize_t address, const extent *e, Py_ssize_t step, Py_ssize_t numbers)
{
    return (float *)address + (step * e->rows + e->start) * numbers;
}

static inline void add_rows(const extent *e, const float *value, Py_ssize_t apart, float *to, Py_ssize_t width)
{
    for (Py_ssize_t row = 0; row < e->stop - e->start; row++)
        for (Py_ssize_t p = 0; p < width; p++)
            to[row * width + p] += value[row * apart + p];
}

static inline void add_bias(const extent *e, Py_ssize_t bias, float *to, Py_ssize_t width)
{
    if (bias)
        add_rows(e, (const float *)bias, 0, to, width);
}

static inline void clear(const extent *e, float *to, Py_ssize_t width)
{
    memset(to, 0, (size_t)((e->stop - e->start) * width) * sizeof *to);
}

/* Gradients of what each step puts out, any strides apart. */
typedef struct {
    Py_ssize_t address, step, row;
} gradients;

static inline const float *grad_at(const gradients *g, const extent *e, Py_ssize_t step)
{
    return (const float *)g->address + step * g->step + e->start * g->row;
}

typedef struct {
    Py_ssize_t width, projected; /* of the cell, and of the state */
    Py_ssize_t gates, cells, squashed, wide, states, first, bias, hidden, projection;
} lstm;

static void lstm_forward(product times, const extent *e, const lstm *l)
{
    const Py_ssize_t H = l->width, P = l->projected, count = e->stop - e->start;
    for (Py_ssize_t t = 0; t < e->steps; t++) {
        const float *before = t ? at(l->states, e, t - 1, P) : at(l->first, e, 0, P);
        float *gates = at(l->gates, e, t, 4 * H), *old = at(l->cells, e, t, H), *new = at(l->cells, e, t + 1, H);
        float *squashed = at(l->squashed, e, t, H), *wide = at(l->wide, e, t, H), *state = at(l->states, e, t, P);
        add_bias(e, l->bias, gates, 4 * H);
        times(before, count, (const float *)l->hidden, P, gates, 4 * H);
        for (Py_ssize_t row = 0; row < count; row++)
            lstm_step(gates + row * 4 * H, old + row * H, new + row * H, squashed + row * H, wide + row * H, H);
        if (l->projection) {
            clear(e, state, P);
            times(wide, count, (const float *)l->projection, H, state, P);
        }
    }
}

typedef struct {
    gradients outputs;
    Py_ssize_t state, cell, gates; /* the gradients of the first state and cell, and those at the gates */
    Py_ssize_t wide, projected;    /* with a projection: room for (rows, H), and the gradients of what it puts out */
} lstm_gradients;

static void lstm_backward(product times, const extent *e, const lstm *l, const lstm_gradients *g)
{
    const Py_ssize_t H = l->width, P = l->projected, count = e->stop - e->start;
    float *state = at(g->state, e, 0, P), *cell = at(g->cell, e, 0, H), *above = state;
    for (Py_ssize_t t = e->steps - 1; t >= 0; t--) {
        const float *gates = at(l->gates, e, t, 4 * H), *old = at(l->cells, e, t, H);
        const float *squashed = at(l->squashed, e, t, H);
        float *gate_grads = at(g->gates, e, t, 4 * H);
        add_rows(e, grad_at(&g->outputs, e, t), g->outputs.row, state, P);
        if (l->projection) {
            float *projected = at(g->projected, e, t, P);
            memcpy(projected, state, (size_t)(count * P) * sizeof *state);
            above = at(g->wide, e, 0, H);
            clear(e, above, H);
            times(projected, count, (const float *)l->projection, P, above, H);
        }
        for (Py_ssize_t row = 0; row < count; row++)
            lstm_back(gates + row * 4 * H, old + row * H, squashed + row * H, above + row * H, cell + row * H,
                      gate_grads + row * 4 * H, H);
        clear(e, state, P);
        times(gate_grads, count, (const float *)l->hidden, 4 * H, state, P);
    }
}

typedef struct {
    Py_ssize_t width;
    Py_ssize_t gates, kept, states, first, bias, hidden;
    Py_ssize_t hidden_bias, recurrent; /* of what comes from the state; and room for it, (rows, 3 H) */
} gru;

static void gru_forward(product times, const extent *e, const gru *l)
{
    const Py_ssize_t H = l->width, count = e->stop - e->start;
    float *recurrent = at(l->recurrent, e, 0, 3 * H);
    for (Py_ssize_t t = 0; t < e->steps; t++) {
        const float *before = t ? at(l->states, e, t - 1, H) : at(l->first, e, 0, H);
        float *gates = at(l->gates, e, t, 3 * H), *kept = at(l->kept, e, t, H), *state = at(l->states, e, t, H);
        add_bias(e, l->bias, gates, 3 * H);
        clear(e, recurrent, 3 * H);
        add_bias(e, l->hidden_bias, recurrent, 3 * H);
        times(before, count, (const float *)l->hidden, H, recurrent, 3 * H);
        for (Py_ssize_t row = 0; row < count; row++)
            gru_step(gates + row * 3 * H, recurrent + row * 3 * H, before + row * H, kept + row * H, state + row * H, H);
    }
}

typedef struct {
    gradients outputs;
    Py_ssize_t state, inputs, hidden; /* the gradient of the first state, and those at the gates by either way */
} gru_gradients;

static void gru_backward(product times, const extent *e, const gru *l, const gru_gradients *g)
{
    const Py_ssize_t H = l->width, count = e->stop - e->start;
    float *state = at(g->state, e, 0, H);
    for (Py_ssize_t t = e->steps - 1; t >= 0; t--) {
        const float *before = t ? at(l->states, e, t - 1, H) : at(l->first, e, 0, H);
        const float *gates = at(l->gates, e, t, 3 * H), *kept = at(l->kept, e, t, H);
        float *inputs = at(g->inputs, e, t, 3 * H), *hidden = at(g->hidden, e, t, 3 * H);
        add_rows(e, grad_at(&g->outputs, e, t), g->outputs.row, state, H);
        for (Py_ssize_t row = 0; row < count; row++)
            gru_back(gates + row * 3 * H, kept + row * H, before + row * H, state + row * H, inputs + row * 3 * H,
                     hidden + row * 3 * H, H);
        times(hidden, count, (const float *)l->hidden, 3 * H, state, H);
    }
}

typedef struct {
    Py_ssize_t width;
    Py_ssize_t states, first, bias, hidden;
    int relu;
} elman;

static void elman_forward(product times, const extent *e, const elman *l)
{
    const Py_ssize_t H = l->width, count = e->stop - e->start;
    for (Py_ssize_t t = 0; t < e->steps; t++) {
        const float *before = t ? at(l->states, e, t - 1, H) : at(l->first, e, 0, H);
        float *state = at(l->states, e, t, H);
        add_bias(e, l->bias, state, H);
        times(before, count, (const float *)l->hidden, H, state, H);
        elman_step(state, count * H, l->relu);
    }
}

typedef struct {
    gradients outputs;
    Py_ssize_t state, gates;
} elman_gradients;

static void elman_backward(product times, const extent *e, const elman *l, const elman_gradients *g)
{
    const Py_ssize_t H = l->width, count = e->stop - e->start;
    float *state = at(g->state, e, 0, H);
    for (Py_ssize_t t = e->steps - 1; t >= 0; t--) {
        float *gates = at(g->gates, e, t, H);
        add_rows(e, grad_at(&g->outputs, e, t), g->outputs.row, state, H);
        elman_back(at(l->states, e, t, H), state, gates, count * H, l->relu);
        clear(e, state, H);
        times(gates, count, (const float *)l->hidden, H, state, H);
    }
}

/* ------------------------------------------------------------------------------------------------ called by Python */

/* Arguments: (steps, rows, start, stop, widest vector), the layer, and for a backward the gradients. */
#define EXTENT "(nnnni)"
#define READ_EXTENT &e.steps, &e.rows, &e.start, &e.stop, &widest
#define READ_OUTPUTS &g.outputs.address, &g.outputs.step, &g.outputs.row
#define READ_LSTM                                                                                                      \
    &l.width, &l.projected, &l.gates, &l.cells, &l.squashed, &l.wide, &l.states, &l.first, &l.bias, &l.hidden,         \
        &l.projection
#define READ_GRU                                                                                                       \
    &l.width, &l.gates, &l.kept, &l.states, &l.first, &l.bias, &l.hidden, &l.hidden_bias, &l.recurrent
#define READ_ELMAN &l.width, &l.states, &l.first, &l.bias, &l.hidden, &l.relu

#define DEFINE_CALLS(KIND, LAYER, READ_LAYER, GRADIENTS, ...)                                                          \
    static PyObject *call_##KIND##_forward(PyObject *module, PyObject *arguments)                                      \
    {                                                                                                                  \
        extent e;                                                                                                      \
        KIND l;                                                                                                        \
        int widest;                                                                                                    \
        if (!PyArg_ParseTuple(arguments, EXTENT LAYER, READ_EXTENT, READ_LAYER))                                       \
            return NULL;                                                                                               \
        Py_BEGIN_ALLOW_THREADS KIND##_forward(found(widest), &e, &l);                                                  \
        Py_END_ALLOW_THREADS Py_RETURN_NONE;                                                                           \
    }                                                                                                                  \
    static PyObject *call_##KIND##_backward(PyObject *module, PyObject *arguments)                                     \
    {                                                                                                                  \
        extent e;                                                                                                      \
        KIND l;                                                                                                        \
        KIND##_gradients g;                                                                                            \
        int widest;                                                                                                    \
        if (!PyArg_ParseTuple(arguments, EXTENT LAYER GRADIENTS, READ_EXTENT, READ_LAYER, READ_OUTPUTS, __VA_ARGS__))  \
            return NULL;                                                                                               \
        Py_BEGIN_ALLOW_THREADS KIND##_backward(found(widest), &e, &l, &g);                                             \
        Py_END_ALLOW_THREADS Py_RETURN_NONE;                                                                           \
    }

DEFINE_CALLS(lstm, "(nnnnnnnnnnn)", READ_LSTM, "(nnn)(nnnnn)", &g.state, &g.cell, &g.gates, &g.wide, &g.projected)
DEFINE_CALLS(gru, "(nnnnnnnnn)", READ_GRU, "(nnn)(nnn)", &g.state, &g.inputs, &g.hidden)
DEFINE_CALLS(elman, "(nnnnni)", READ_ELMAN, "(nnn)(nn)", &g.state, &g.gates)

static PyMethodDef methods[] = {
    {"lstm_forward", call_lstm_forward, METH_VARARGS, "All steps of an LSTM."},
    {"lstm_backward", call_lstm_backward, METH_VARARGS, "Gradients at its gates, its first state and its first cell."},
    {"gru_forward", call_gru_forward, METH_VARARGS, "All steps of a GRU."},
    {"gru_backward", call_gru_backward, METH_VARARGS, "Gradients at its gates and its first state."},
    {"elman_forward", call_elman_forward, METH_VARARGS, "All steps of a tanh or ReLU network."},
    {"elman_backward", call_elman_backward, METH_VARARGS, "Gradients at its gates and its first state."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_recurrence", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__recurrence(void)
{
    return PyModule_Create(&definition);
}
