// Settings of log_mel_fbank as they travel from Python: spkfast/frontend_tables.py says what each
// one means.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spkfast {

struct LogMelFbankSettings {
  static constexpr size_t kIntegers = 15, kFloats = 12;

  int64_t frame_shift, fft_size, first_frame, offset;
  int64_t padding;  // 0 zeros, 1 reflection, 2 reflection with the edge repeated
  int64_t frame_multiple;
  int64_t waveform_norm;     // 0 none, 1 mean_std, 2 instance
  int64_t preemphasis_mode;  // 0 frame, 1 signal, 2 signal with a zero before it
  bool remove_dc, magnitude;
  int64_t energy;  // 0 none, 1 raw, 2 windowed
  bool energy_last, mean_norm, std_norm, std_unbiased;
  double sample_scale, preemphasis, spectrum_low, spectrum_high, energy_floor, log_floor;
  double log_offset, log_scale, top_db, var_eps, std_eps, dither;

  LogMelFbankSettings(const int64_t* i, const double* f)
      : frame_shift(i[0]),
        fft_size(i[1]),
        first_frame(i[2]),
        offset(i[3]),
        padding(i[4]),
        frame_multiple(i[5]),
        waveform_norm(i[6]),
        preemphasis_mode(i[7]),
        remove_dc(i[8] != 0),
        magnitude(i[9] != 0),
        energy(i[10]),
        energy_last(i[11] != 0),
        mean_norm(i[12] != 0),
        std_norm(i[13] != 0),
        std_unbiased(i[14] != 0),
        sample_scale(f[0]),
        preemphasis(f[1]),
        spectrum_low(f[2]),
        spectrum_high(f[3]),
        energy_floor(f[4]),
        log_floor(f[5]),
        log_offset(f[6]),
        log_scale(f[7]),
        top_db(f[8]),
        var_eps(f[9]),
        std_eps(f[10]),
        dither(f[11]) {}

  bool operator==(const LogMelFbankSettings&) const = default;

  int64_t count_frames(int64_t samples) const {
    if (samples < 1 || samples < first_frame) return 0;
    return (samples - first_frame) / frame_shift + 1;
  }

  // Frames of the output for rows of `samples`.
  int64_t padded_frames(int64_t samples) const {
    const int64_t frames = samples < first_frame ? 0 : (samples - first_frame) / frame_shift + 1;
    return (frames + frame_multiple - 1) / frame_multiple * frame_multiple;
  }
};

}  // namespace spkfast
