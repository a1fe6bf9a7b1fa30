// Half precision to floats and back. Part of attention_loop.inl.

typedef std::uint16_t Halves __attribute__((vector_size(2 * ASTRA_LANES)));
typedef std::uint16_t LooseHalves
    __attribute__((vector_size(2 * ASTRA_LANES), aligned(2), may_alias));

inline Bits all_bits(std::uint32_t x) { return x - Bits{}; }
// Where `mask` has all bits set, of `a`, else of `b`.
inline Bits chosen(Bits mask, Bits a, Bits b) { return (mask & a) | (~mask & b); }

inline Floats widened_bfloat16(Bits x) { return (Floats)(x << 16); }

// fp16 has 5 bits of exponent, biased by 15, and 10 of fraction; subnormals are made by a
// difference of normal floats.
inline Floats widened_float16(Bits x) {
  constexpr std::uint32_t kSmallest = (127 - 14) << 23;
  constexpr std::uint32_t kRebias = (127 - 15) << 23;
  const Bits exponent = x & 0x7c00;
  const Bits magnitude = (x & 0x7fff) << 13;
  const Bits normal = magnitude + kRebias;
  const Bits small = (Bits)((Floats)(magnitude + kSmallest) - (Floats)all_bits(kSmallest));
  Bits y = chosen((Bits)(exponent == 0), small, normal);
  y = chosen((Bits)(exponent == 0x7c00), magnitude | 0x7f800000, y);
  return (Floats)(y | (x & 0x8000) << 16);
}

inline Bits narrowed_bfloat16(Floats floats) {
  const Bits x = (Bits)floats;
  const Bits rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
  return chosen((Bits)(floats != floats), x >> 16 | 0x40, rounded);
}

inline Bits narrowed_float16(Floats floats) {
  constexpr std::uint32_t kSmallest = (127 - 14) << 23;  // that is not subnormal
  constexpr std::uint32_t kTooLarge = (127 + 16) << 23;
  // A float whose last bit is worth as much as that of fp16's subnormals.
  constexpr std::uint32_t kAligned = (127 - 14 + 13) << 23;
  const Bits sign = (Bits)floats & 0x80000000;
  const Bits x = (Bits)floats ^ sign;
  const Bits normal = (x - ((127 - 15) << 23) + 0xfff + (x >> 13 & 1)) >> 13;
  const Bits small = (Bits)((Floats)x + (Floats)all_bits(kAligned)) - kAligned;
  Bits y = chosen((Bits)(x < kSmallest), small, normal);
  y = chosen((Bits)(x >= kTooLarge), all_bits(0x7c00), y);
  y = chosen((Bits)(floats != floats), all_bits(0x7e00), y);
  return y | sign >> 16;
}

inline void widen_vector(Halves halves, bool is_bfloat16, float* to) {
  const Bits x = __builtin_convertvector(halves, Bits);
  store(to, is_bfloat16 ? widened_bfloat16(x) : widened_float16(x));
}

inline Halves narrow_vector(const float* from, bool is_bfloat16) {
  const Floats x = load(from);
  const Bits y = is_bfloat16 ? narrowed_bfloat16(x) : narrowed_float16(x);
  return __builtin_convertvector(y, Halves);
}

void widen(const std::uint16_t* from, std::size_t count, bool is_bfloat16, float* to) {
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    widen_vector(*reinterpret_cast<const LooseHalves*>(from + i), is_bfloat16, to + i);
  }
  if (i == count) return;
  Halves last{};
  for (std::size_t k = 0; i + k < count; ++k) last[k] = from[i + k];
  float room[kLanes];
  widen_vector(last, is_bfloat16, room);
  for (std::size_t k = 0; i + k < count; ++k) to[i + k] = room[k];
}

void narrow(const float* from, std::size_t count, bool is_bfloat16, std::uint16_t* to) {
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    *reinterpret_cast<LooseHalves*>(to + i) = narrow_vector(from + i, is_bfloat16);
  }
  if (i == count) return;
  float room[kLanes] = {};
  for (std::size_t k = 0; i + k < count; ++k) room[k] = from[i + k];
  const Halves last = narrow_vector(room, is_bfloat16);
  for (std::size_t k = 0; i + k < count; ++k) to[i + k] = last[k];
}
