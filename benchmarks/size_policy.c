// Small ReLU networks, trained and judged; what size_policy.py calls. A network is one array: of each layer the weight,
// inputs x outputs, then the bias. `sizes` holds inputs, widths, outputs. Targets are classes, or numbers where there is
// one output.
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 4 };

static long begin_of(const int *sizes, int layer) {
    long begin = 0;
    for (int k = 0; k < layer; k++) begin += (long)(sizes[k] + 1) * sizes[k + 1];
    return begin;
}

// out[n, to] = in[n, from] W + b, through a ReLU but in the last layer; four inputs at a time
static void forward(int layers, const int *sizes, const float *p, const float *x, int n, float **h) {
    for (int l = 0; l < layers; l++) {
        const int from = sizes[l], to = sizes[l + 1];
        const float *W = p + begin_of(sizes, l), *b = W + (long)from * to, *in = l ? h[l - 1] : x;
        for (int s = 0; s < n; s++) {
            float *restrict out = h[l] + (long)s * to;
            const float *restrict a = in + (long)s * from;
            memcpy(out, b, sizeof(float) * to);
            int i = 0;
            for (; i + 3 < from; i += 4) {
                const float *restrict w = W + (long)i * to;
                if (a[i] == 0 && a[i + 1] == 0 && a[i + 2] == 0 && a[i + 3] == 0) continue;
                for (int j = 0; j < to; j++)
                    out[j] += a[i] * w[j] + a[i + 1] * w[j + to] + a[i + 2] * w[j + 2 * to] + a[i + 3] * w[j + 3 * to];
            }
            for (; i < from; i++)
                for (int j = 0; j < to; j++) out[j] += a[i] * W[(long)i * to + j];
            if (l < layers - 1)
                for (int j = 0; j < to; j++) out[j] = out[j] > 0 ? out[j] : 0;
        }
    }
}

// mean loss of n outputs; its gradient in `slope` unless that is null
static double loss_of(int outputs, const float *out, int n, const int *label, const float *value, float *slope) {
    double total = 0;
    for (int s = 0; s < n; s++) {
        const float *q = out + (long)s * outputs;
        if (outputs == 1) {
            const float off = q[0] - value[s];
            total += off * off;
            if (slope) slope[s] = 2 * off / n;
            continue;
        }
        float most = q[0];
        double sum = 0;
        for (int j = 1; j < outputs; j++) most = q[j] > most ? q[j] : most;
        for (int j = 0; j < outputs; j++) sum += expf(q[j] - most);
        total += log(sum) + most - q[label[s]];
        if (!slope) continue;
        for (int j = 0; j < outputs; j++) slope[(long)s * outputs + j] = expf(q[j] - most) / sum / n;
        slope[(long)s * outputs + label[s]] -= 1.f / n;
    }
    return total / n;
}

// gradient of all parameters, from the slope of the outputs in slopes[layers - 1]; n is a multiple of four
static void backward(int layers, const int *sizes, const float *p, const float *x, int n, float **h, float **slopes,
                     float *g) {
    memset(g, 0, sizeof(float) * begin_of(sizes, layers));
    for (int l = layers - 1; l >= 0; l--) {
        const int from = sizes[l], to = sizes[l + 1];
        float *gW = g + begin_of(sizes, l), *gb = gW + (long)from * to;
        const float *W = p + begin_of(sizes, l), *in = l ? h[l - 1] : x;
        for (int s = 0; s < n; s++)
            for (int j = 0; j < to; j++) gb[j] += slopes[l][(long)s * to + j];
        for (int s = 0; s < n; s += 4) {  // four samples at a time
            const float *restrict d = slopes[l] + (long)s * to, *restrict a = in + (long)s * from;
            for (int i = 0; i < from; i++) {
                const float a0 = a[i], a1 = a[i + from], a2 = a[i + 2 * from], a3 = a[i + 3 * from];
                float *restrict row = gW + (long)i * to;
                if (a0 == 0 && a1 == 0 && a2 == 0 && a3 == 0) continue;
                for (int j = 0; j < to; j++)
                    row[j] += a0 * d[j] + a1 * d[j + to] + a2 * d[j + 2 * to] + a3 * d[j + 3 * to];
            }
        }
        for (int s = 0; l && s < n; s++) {
            const float *restrict d = slopes[l] + (long)s * to;
            for (int i = 0; i < from; i++) {
                const float *restrict w = W + (long)i * to;
                float sum = 0;
                if (in[(long)s * from + i] > 0)
                    for (int j = 0; j < to; j++) sum += w[j] * d[j];
                slopes[l - 1][(long)s * from + i] = sum;
            }
        }
    }
}

// loss of each of `chunks` equal parts of the data in `each`; returns their mean
double judge(int layers, const int *sizes, const float *p, const float *x, const int *label, const float *value, int n,
             int chunks, double *each) {
    const int size = n / chunks;
    float *h[LAYERS];
    double sum = 0;
    for (int l = 0; l < layers; l++) h[l] = malloc(sizeof(float) * (long)size * sizes[l + 1]);
    for (int c = 0; c < chunks; c++) {
        const long at = (long)c * size;
        forward(layers, sizes, p, x + at * sizes[0], size, h);
        each[c] = loss_of(sizes[layers], h[layers - 1], size, label ? label + at : 0, value ? value + at : 0, 0);
        sum += each[c];
    }
    for (int l = 0; l < layers; l++) free(h[l]);
    return sum / chunks;
}

// Steps of AdamW(0.9, 0.99). `one`, `two`: products of the betas since each entry was born. The rate rises over 20 steps
// and falls in a line over the last `decay` of the budget, of which `spent` is gone before and `per_step` goes a step.
// `average`: weights are added to it from step `average_from` on, unless it is null.
void train(int layers, const int *sizes, float *p, float *m, float *v, float *one, float *two, const float *X,
           const int *labels, const float *values, const int *drawn, long draws, int batch, long done, int steps,
           double rate, double spent, double per_step, double decay, double weight_decay, float *average,
           int average_from) {
    const long count = begin_of(sizes, layers);
    float *h[LAYERS], *slopes[LAYERS], *g = malloc(sizeof(float) * count);
    float *x = malloc(sizeof(float) * batch * sizes[0]), *value = malloc(sizeof(float) * batch);
    int *label = malloc(sizeof(int) * batch);
    for (int l = 0; l < layers; l++) {
        h[l] = malloc(sizeof(float) * batch * sizes[l + 1]);
        slopes[l] = malloc(sizeof(float) * batch * sizes[l + 1]);
    }
    for (int k = 0; k < steps; k++) {
        const int *chosen = drawn + (done + k) % draws * batch;
        for (int s = 0; s < batch; s++) {
            memcpy(x + (long)s * sizes[0], X + (long)chosen[s] * sizes[0], sizeof(float) * sizes[0]);
            if (labels) label[s] = labels[chosen[s]];
            else value[s] = values[chosen[s]];
        }
        forward(layers, sizes, p, x, batch, h);
        loss_of(sizes[layers], h[layers - 1], batch, label, value, slopes[layers - 1]);
        backward(layers, sizes, p, x, batch, h, slopes, g);
        const double rising = fmin(1, (done + k + 1) / 20.), left = (1 - spent - k * per_step) / decay;
        const float lr = rate * rising * fmax(0, fmin(1, left)), kept = 1 - lr * weight_decay;
        for (long i = 0; i < count; i++) {
            one[i] = one[i] < 1e-20f ? 0 : one[i] * .9f;
            two[i] = two[i] < 1e-20f ? 0 : two[i] * .99f;
            m[i] = .9f * m[i] + .1f * g[i];
            v[i] = .99f * v[i] + .01f * g[i] * g[i];
            p[i] = p[i] * kept - lr * (m[i] / (1 - one[i])) / (sqrtf(v[i] / (1 - two[i])) + 1e-8f);
        }
        for (long i = 0; average && k >= average_from && i < count; i++) average[i] += p[i];
    }
    for (int l = 0; l < layers; l++) free(h[l]), free(slopes[l]);
    free(g), free(x), free(value), free(label);
}
