// Log-mel features from PCM, the same computation as the graph of `export/features.py`: pre-emphasis, window, power
// spectrum, mel filters, log. Computed in fp64: fp32 transforms differ by up to 2e-4 in quiet bins, and fp64 is cheap
// here.

#define HALF_FFT (N_FFT / 2)
#define SPAN (WINDOW - 2)  // samples of a frame with a non-zero window

// One block per mel frame. Grid (mel frames, rows), block BLOCK.
extern "C" __global__ void __launch_bounds__(BLOCK) features(const Step s) {
  __shared__ double real[N_FFT], imaginary[N_FFT];
  const int frame = blockIdx.x, row = blockIdx.y, thread = threadIdx.x;
  if (s.row_slot[row] < 0) return;
  const int length = s.row_length[row];
  const float* wave = s.waveform + (long long)row * (TAIL + s.samples);
  for (int i = thread; i < N_FFT; i += BLOCK) {
    double x = 0.0;
    const int m = HOP * frame + i;  // index of the pre-emphasised sample; new samples start at TAIL - 1
    if (i < SPAN && m - (TAIL - 1) < length)
      x = (double(wave[m + 1]) - PREEMPHASIS * double(wave[m])) * s.window[i];
    int reversed = 0;
    for (int bit = 1, rest = i; bit < N_FFT; bit *= 2, rest /= 2) reversed = 2 * reversed + rest % 2;
    real[reversed] = x;
    imaginary[reversed] = 0.0;
  }
  for (int size = 1; size < N_FFT; size *= 2) {  // Cooley-Tukey, in place
    __syncthreads();
    for (int i = thread; i < HALF_FFT; i += BLOCK) {
      const int index = i / size * 2 * size + i % size, other = index + size;
      const double2 turn = s.twiddles[i % size * (HALF_FFT / size)];
      const double x = real[other] * turn.x - imaginary[other] * turn.y;
      const double y = real[other] * turn.y + imaginary[other] * turn.x;
      real[other] = real[index] - x;
      imaginary[other] = imaginary[index] - y;
      real[index] += x;
      imaginary[index] += y;
    }
  }
  __syncthreads();
  for (int i = thread; i <= HALF_FFT; i += BLOCK) real[i] = real[i] * real[i] + imaginary[i] * imaginary[i];
  __syncthreads();
  for (int mel = thread; mel < MELS; mel += BLOCK) {
    double sum = 0.0;
    for (int bin = s.filter_bins[2 * mel]; bin < s.filter_bins[2 * mel + 1]; ++bin)
      sum += real[bin] * s.filters[bin * MELS + mel];
    s.mel[((long long)row * SUBSAMPLING * s.frames + frame) * MELS + mel] = float(log(sum + *s.guard));
  }
}
