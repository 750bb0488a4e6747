/* Standard normal draws from random words: what normal.py says, operation by operation, and with the same bits.
 *
 * No floating-point contraction and no library function: compile with -ffp-contract=off. The loops are written so that
 * the compiler turns them into vector code; on x86-64 with GNU tools it does so for several generations of processors,
 * and the right one is taken when the module is loaded.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "_vectors.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_CIPHER 1
#include <immintrin.h>
#else
#define HAS_CIPHER 0
#endif

/* Pairs at once: their words and draws stay in the innermost cache. */
enum { BLOCK = 256, ROUNDS = 14 };

static const uint64_t ONE = UINT64_C(0x3FF0000000000000);     /* the bits of 1.0 */
static const uint64_t HALF_ROOT = UINT64_C(0x3FE6A09E667F3BCD); /* of the square root of 1/2 */
static const uint64_t WHOLE = UINT64_C(0x4330000000000000);   /* of 2^52: below it, bits are a whole number */
static const double TURN = 6755399441055744.0;                /* 1.5 * 2^52: adding it rounds to a whole number */

static inline double as_double(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t as_bits(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* -2 log(2 - x) for x in [1, 2): the squared radius. */
static inline double squared_radius(double x)
{
    double u = 2.0 - x;
    uint64_t exponent = (as_bits(u) - HALF_ROOT + ONE) >> 52;
    double f = as_double(as_bits(u) - (exponent << 52) + ONE) - 1.0;
    double e = as_double(exponent | WHOLE) - 4503599627371519.0;
    double s = f / (f + 2.0);
    double z = s * s;
    double r = z * 1.479819860511658591e-01 + 1.531383769920937332e-01;
    r = r * z + 1.818357216161805012e-01;
    r = r * z + 2.222219843214978396e-01;
    r = r * z + 2.857142874366239149e-01;
    r = r * z + 3.999999999940941908e-01;
    r = r * z + 6.666666666666735130e-01;
    r = r * z;
    double h = f * f * 0.5;
    double log = e * 6.93147180369123816490e-01 - ((h - ((h + r) * s + e * 1.90821492927058770002e-10)) - f);
    return log * -2.0;
}

/* Sine and cosine of the angle (x - 3/2) turns, for x in [1, 2). */
static inline void on_circle(double x, double *sine, double *cosine)
{
    double quarters = (x - 1.5) * 4.0;
    double rounded = quarters + TURN;
    uint64_t quadrant = as_bits(rounded);
    double a = (quarters - (rounded - TURN)) * 1.57079632679489661923;
    double z = a * a;
    double s = z * 1.58969099521155010221e-10 + -2.50507602534068634195e-08;
    s = s * z + 2.75573137070700676789e-06;
    s = s * z + -1.98412698298579493134e-04;
    s = s * z + 8.33333333332248946124e-03;
    s = s * z + -1.66666666666666324348e-01;
    s = s * z * a + a;
    double c = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09;
    c = c * z + -2.75573143513906633035e-07;
    c = c * z + 2.48015872894767294178e-05;
    c = c * z + -1.38888888888741095749e-03;
    c = c * z + 4.16666666666666019037e-02;
    c = c * z * z - z * 0.5 + 1.0;
    uint64_t turned = UINT64_C(0) - (quadrant & 1);
    uint64_t along = as_bits(s), across = as_bits(c);
    *sine = as_double(((along & ~turned) | (across & turned)) ^ ((quadrant & 2) << 62));
    *cosine = as_double(((across & ~turned) | (along & turned)) ^ (((quadrant + 1) & 2) << 62));
}

static inline void draw(const uint64_t *radius, const uint64_t *angle, double *sine, double *cosine, Py_ssize_t count)
{
    INDEPENDENT
    for (Py_ssize_t i = 0; i < count; i++) {
        double length = sqrt(squared_radius(as_double(radius[i] >> 12 | ONE)));
        double s, c;
        on_circle(as_double(angle[i] >> 12 | ONE), &s, &c);
        sine[i] = length * s;
        cosine[i] = length * c;
    }
}

FOR_EVERY_PROCESSOR
static void fill_draws(const uint64_t *words, double *draws, Py_ssize_t count)
{
    Py_ssize_t pairs = (count + 1) / 2;
    double sine[BLOCK], cosine[BLOCK];
    for (Py_ssize_t at = 0; at < pairs; at += BLOCK) {
        Py_ssize_t first = Py_MIN(BLOCK, pairs - at), second = Py_MIN(first, count - pairs - at);
        draw(words + at, words + pairs + at, sine, cosine, first);
        memcpy(draws + at, sine, (size_t)first * sizeof *sine);
        if (second > 0)
            memcpy(draws + pairs + at, cosine, (size_t)second * sizeof *cosine);
    }
}

/* target may be value, but overlap it in no other way. */
static inline void add_draws(const double *draws, const float *value, float *target, Py_ssize_t count, double scale,
                             double share)
{
    INDEPENDENT
    for (Py_ssize_t i = 0; i < count; i++)
        target[i] = (float)((double)value[i] * share + draws[i] * scale);
}

FOR_EVERY_PROCESSOR
static void add_scaled_draws(const uint64_t *words, const float *value, float *target, Py_ssize_t count, double scale,
                             double share)
{
    Py_ssize_t pairs = (count + 1) / 2;
    double sine[BLOCK], cosine[BLOCK];
    for (Py_ssize_t at = 0; at < pairs; at += BLOCK) {
        Py_ssize_t first = Py_MIN(BLOCK, pairs - at), second = Py_MIN(first, count - pairs - at);
        draw(words + at, words + pairs + at, sine, cosine, first);
        add_draws(sine, value + at, target + at, first, scale, share);
        add_draws(cosine, value + pairs + at, target + pairs + at, second, scale, share);
    }
}

/* --------------------------------------------------------------------------------------------------- the keystream
 *
 * AES-256 in counter mode (FIPS 197, NIST SP 800-38A) by the processor's own instructions: in constant time, and made
 * where it is used. The same words as those of any other implementation; rng.py has another one, for where these are
 * missing.
 */

#if HAS_CIPHER

typedef struct {
    __m128i round[ROUNDS + 1];
} Schedule;

static int can_cipher(void)
{
    return __builtin_cpu_supports("aes") && __builtin_cpu_supports("sse4.1");
}

static int can_cipher_wide(void)
{
    return __builtin_cpu_supports("vaes") && __builtin_cpu_supports("avx512f");
}

__attribute__((target("aes,sse4.1"))) static inline __m128i mixed(__m128i key, __m128i assist)
{
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
    return _mm_xor_si128(key, assist);
}

__attribute__((target("aes,sse4.1"))) static void expand_key(const uint8_t *key, Schedule *schedule)
{
    __m128i *round = schedule->round;
    round[0] = _mm_loadu_si128((const __m128i *)key);
    round[1] = _mm_loadu_si128((const __m128i *)(key + 16));
#define EVEN(i, constant) \
    round[i] = mixed(round[i - 2], _mm_shuffle_epi32(_mm_aeskeygenassist_si128(round[i - 1], constant), 0xFF))
#define ODD(i) round[i] = mixed(round[i - 2], _mm_shuffle_epi32(_mm_aeskeygenassist_si128(round[i - 1], 0), 0xAA))
    EVEN(2, 0x01), ODD(3), EVEN(4, 0x02), ODD(5), EVEN(6, 0x04), ODD(7), EVEN(8, 0x08), ODD(9);
    EVEN(10, 0x10), ODD(11), EVEN(12, 0x20), ODD(13), EVEN(14, 0x40);
#undef EVEN
#undef ODD
}

enum { LANES = 8, WIDE = 16 };

__attribute__((target("aes,sse4.1"))) static void encrypt_some(const Schedule *schedule, uint64_t counter,
                                                              uint64_t *words)
{
    __m128i block[LANES];
    for (int i = 0; i < LANES; i++)
        block[i] = _mm_set_epi64x((long long)__builtin_bswap64(counter + (uint64_t)i), 0);
    for (int i = 0; i < LANES; i++)
        block[i] = _mm_xor_si128(block[i], schedule->round[0]);
    for (int r = 1; r < ROUNDS; r++)
        for (int i = 0; i < LANES; i++)
            block[i] = _mm_aesenc_si128(block[i], schedule->round[r]);
    for (int i = 0; i < LANES; i++)
        _mm_storeu_si128((__m128i *)words + i, _mm_aesenclast_si128(block[i], schedule->round[ROUNDS]));
}

__attribute__((target("vaes,avx512f"))) static void encrypt_many(const Schedule *schedule, uint64_t counter,
                                                              uint64_t *words)
{
    __m512i block[WIDE / 4];
    for (int i = 0; i < WIDE / 4; i++) {
        uint64_t at = counter + 4 * (uint64_t)i;
        block[i] = _mm512_set_epi64(
            (long long)__builtin_bswap64(at + 3), 0, (long long)__builtin_bswap64(at + 2), 0,
            (long long)__builtin_bswap64(at + 1), 0, (long long)__builtin_bswap64(at), 0);
        block[i] = _mm512_xor_si512(block[i], _mm512_broadcast_i32x4(schedule->round[0]));
    }
    for (int r = 1; r < ROUNDS; r++) {
        __m512i round = _mm512_broadcast_i32x4(schedule->round[r]);
        for (int i = 0; i < WIDE / 4; i++)
            block[i] = _mm512_aesenc_epi128(block[i], round);
    }
    __m512i last = _mm512_broadcast_i32x4(schedule->round[ROUNDS]);
    for (int i = 0; i < WIDE / 4; i++)
        _mm512_storeu_si512(words + 8 * i, _mm512_aesenclast_epi128(block[i], last));
}

/* Words first to first + count into memory that has room for BLOCK + 2 * WIDE; returns where they begin. */
static const uint64_t *keystream(const Schedule *schedule, int wide, uint64_t first, Py_ssize_t count, uint64_t *memory)
{
    uint64_t counter = first / 2;
    Py_ssize_t blocks = (Py_ssize_t)((first + (uint64_t)count + 1) / 2 - counter);
    for (Py_ssize_t at = 0; at < blocks; at += wide ? WIDE : LANES)
        (wide ? encrypt_many : encrypt_some)(schedule, counter + (uint64_t)at, memory + 2 * at);
    return memory + first % 2;
}

FOR_EVERY_PROCESSOR
static void draw_block(const uint64_t *radius, const uint64_t *angle, double *sine, double *cosine, Py_ssize_t count)
{
    draw(radius, angle, sine, cosine, count);
}

FOR_EVERY_PROCESSOR
static void add_block(const double *draws, const float *value, float *target, Py_ssize_t count, double scale,
                      double share)
{
    add_draws(draws, value, target, count, scale, share);
}

static void add_piece(const Schedule *schedule, int wide, uint64_t start, const float *value, float *target,
                      Py_ssize_t count, double scale, double share)
{
    Py_ssize_t pairs = (count + 1) / 2;
    double sine[BLOCK], cosine[BLOCK];
    uint64_t one[BLOCK + 2 * WIDE], two[BLOCK + 2 * WIDE];
    for (Py_ssize_t at = 0; at < pairs; at += BLOCK) {
        Py_ssize_t first = Py_MIN(BLOCK, pairs - at), second = Py_MIN(first, count - pairs - at);
        const uint64_t *radius = keystream(schedule, wide, start + (uint64_t)at, first, one);
        const uint64_t *angle = keystream(schedule, wide, start + (uint64_t)(pairs + at), first, two);
        draw_block(radius, angle, sine, cosine, first);
        add_block(sine, value + at, target + at, first, scale, share);
        add_block(cosine, value + pairs + at, target + pairs + at, second, scale, share);
    }
}

static void add_keyed_draws(const uint8_t *key, uint64_t start, Py_ssize_t piece, const float *value, float *target,
                            Py_ssize_t count, double scale, double share)
{
    Schedule schedule;
    expand_key(key, &schedule);
    int wide = can_cipher_wide();
    for (Py_ssize_t at = 0; at < count; at += piece) {
        Py_ssize_t some = Py_MIN(piece, count - at);
        add_piece(&schedule, wide, start + (uint64_t)at, value + at, target + at, some, scale, share);
    }
}

#else

static int can_cipher(void)
{
    return 0;
}

static void add_keyed_draws(const uint8_t *key, uint64_t start, Py_ssize_t piece, const float *value, float *target,
                            Py_ssize_t count, double scale, double share)
{
    (void)key, (void)start, (void)piece, (void)value, (void)target, (void)count, (void)scale, (void)share;
}

#endif

/* ---------------------------------------------------------------------------------------------------- for Python */

static int need(const char *what, const Py_buffer *view, Py_ssize_t size, Py_ssize_t count)
{
    if (view->itemsize == size && view->len >= size * count && ((uintptr_t)view->buf % (uintptr_t)size) == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s: %zd bytes in items of %zd; need %zd aligned items of %zd", what, view->len,
                 view->itemsize, count, size);
    return 0;
}

static PyObject *fill(PyObject *module, PyObject *args)
{
    Py_buffer words, draws;
    if (!PyArg_ParseTuple(args, "y*w*", &words, &draws))
        return NULL;
    Py_ssize_t count = draws.len / (Py_ssize_t)sizeof(double);
    int right = need("words", &words, sizeof(uint64_t), (count + 1) / 2 * 2) &&
                need("draws", &draws, sizeof(double), count);
    if (right) {
        Py_BEGIN_ALLOW_THREADS
        fill_draws(words.buf, draws.buf, count);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&words);
    PyBuffer_Release(&draws);
    if (!right)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *add(PyObject *module, PyObject *args)
{
    Py_buffer words, value, target;
    double scale, share;
    if (!PyArg_ParseTuple(args, "y*y*w*dd", &words, &value, &target, &scale, &share))
        return NULL;
    Py_ssize_t count = target.len / (Py_ssize_t)sizeof(float);
    int right = need("words", &words, sizeof(uint64_t), (count + 1) / 2 * 2) &&
                need("value", &value, sizeof(float), count) && need("target", &target, sizeof(float), count);
    if (right) {
        Py_BEGIN_ALLOW_THREADS
        add_scaled_draws(words.buf, value.buf, target.buf, count, scale, share);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&words);
    PyBuffer_Release(&value);
    PyBuffer_Release(&target);
    if (!right)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *add_keyed(PyObject *module, PyObject *args)
{
    Py_buffer key, value, target;
    unsigned long long start;
    Py_ssize_t piece;
    double scale, share;
    if (!PyArg_ParseTuple(args, "y*Kny*w*dd", &key, &start, &piece, &value, &target, &scale, &share))
        return NULL;
    Py_ssize_t count = target.len / (Py_ssize_t)sizeof(float);
    int right = need("value", &value, sizeof(float), count) && need("target", &target, sizeof(float), count);
    if (right && (key.len != 32 || piece <= 0 || piece % 2 || start % 2 || !can_cipher())) {
        PyErr_SetString(PyExc_ValueError, "need a key of 32 bytes, even start and piece, and AES instructions");
        right = 0;
    }
    if (right) {
        Py_BEGIN_ALLOW_THREADS
        add_keyed_draws(key.buf, start, piece, value.buf, target.buf, count, scale, share);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&key);
    PyBuffer_Release(&value);
    PyBuffer_Release(&target);
    if (!right)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *has_cipher(PyObject *module, PyObject *args)
{
    return PyBool_FromLong(can_cipher());
}

static PyMethodDef methods[] = {
    {"has_cipher", has_cipher, METH_NOARGS, "Whether add_keyed can be called on this processor."},
    {"add_keyed", add_keyed, METH_VARARGS, "add_keyed(key, start, piece, value, target, scale, share): see normal.py."},
    {"fill", fill, METH_VARARGS, "fill(words, draws): see discreet.core.normal."},
    {"add", add, METH_VARARGS, "add(words, value, target, scale, share): see discreet.core.normal."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_normal", "The compiled half of discreet.core.normal.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__normal(void)
{
    return PyModule_Create(&definition);
}
