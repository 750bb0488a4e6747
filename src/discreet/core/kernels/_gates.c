/* One step of an LSTM in time, all gates at once: what gates.py describes.
 *
 * exp and tanh are Cephes' polynomials (S. Moshier, expf.c and tanhf.c), below two units in the last place. The loops
 * are written so that the compiler turns them into vector code, for several generations of x86-64.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif

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

/* Gates of one example, in the order in, forget, candidate, out: what enters them before, what leaves them after. */
FOR_EVERY_PROCESSOR
static void forward(float *gates, const float *before, float *cell, float *squashed, float *state, Py_ssize_t width)
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
static void backward(const float *gates, const float *before, const float *squashed, const float *state_grad,
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

/* Rows of the gates are a number of floats apart, as they lie in (rows, steps, gates); all others are rows by width. */
static PyObject *call_forward(PyObject *module, PyObject *arguments)
{
    Py_ssize_t gates, apart, before, cell, squashed, state, start, stop, width;
    if (!PyArg_ParseTuple(arguments, "nnnnnnnnn", &gates, &apart, &before, &cell, &squashed, &state, &start, &stop,
                          &width))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t row = start; row < stop; row++)
        forward((float *)gates + row * apart, (const float *)before + row * width, (float *)cell + row * width,
                (float *)squashed + row * width, (float *)state + row * width, width);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *call_backward(PyObject *module, PyObject *arguments)
{
    Py_ssize_t gates, apart, before, squashed, state_grad, cell_grad, gate_grads, grads_apart, start, stop, width;
    if (!PyArg_ParseTuple(arguments, "nnnnnnnnnnn", &gates, &apart, &before, &squashed, &state_grad, &cell_grad,
                          &gate_grads, &grads_apart, &start, &stop, &width))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t row = start; row < stop; row++)
        backward((const float *)gates + row * apart, (const float *)before + row * width,
                 (const float *)squashed + row * width, (const float *)state_grad + row * width,
                 (float *)cell_grad + row * width, (float *)gate_grads + row * grads_apart, width);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"forward", call_forward, METH_VARARGS, "Gates, cell and state of one step."},
    {"backward", call_backward, METH_VARARGS, "Gradients at the gates of one step."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_gates", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__gates(void)
{
    return PyModule_Create(&definition);
}
