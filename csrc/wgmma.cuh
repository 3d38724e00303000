// wgmma's instructions: one for every width of the accumulator and element type. For hopper.cuh,
// which says what they compute (`product`).
#pragma once

#include <type_traits>

#include "types.cuh"

namespace reap {

// An instruction names each register of its accumulator, so text and operands are lists by hand: by
// eights, then each width as the one before and 16 more.
#define REAP_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REAP_NAMES_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define REAP_NAMES_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define REAP_NAMES_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define REAP_NAMES_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define REAP_NAMES_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define REAP_NAMES_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define REAP_NAMES_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define REAP_NAMES_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define REAP_NAMES_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define REAP_NAMES_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define REAP_NAMES_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define REAP_NAMES_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define REAP_NAMES_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define REAP_NAMES_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define REAP_NAMES_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define REAP_TEXT_32 REAP_NAMES_0 ", " REAP_NAMES_1
#define REAP_TEXT_64 REAP_TEXT_32 ", " REAP_NAMES_2 ", " REAP_NAMES_3
#define REAP_TEXT_96 REAP_TEXT_64 ", " REAP_NAMES_4 ", " REAP_NAMES_5
#define REAP_TEXT_128 REAP_TEXT_96 ", " REAP_NAMES_6 ", " REAP_NAMES_7
#define REAP_TEXT_160 REAP_TEXT_128 ", " REAP_NAMES_8 ", " REAP_NAMES_9
#define REAP_TEXT_192 REAP_TEXT_160 ", " REAP_NAMES_10 ", " REAP_NAMES_11
#define REAP_TEXT_224 REAP_TEXT_192 ", " REAP_NAMES_12 ", " REAP_NAMES_13
#define REAP_TEXT_256 REAP_TEXT_224 ", " REAP_NAMES_14 ", " REAP_NAMES_15
#define REAP_EIGHT(i)                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define REAP_HELD_32 REAP_EIGHT(0), REAP_EIGHT(8)
#define REAP_HELD_64 REAP_HELD_32, REAP_EIGHT(16), REAP_EIGHT(24)
#define REAP_HELD_96 REAP_HELD_64, REAP_EIGHT(32), REAP_EIGHT(40)
#define REAP_HELD_128 REAP_HELD_96, REAP_EIGHT(48), REAP_EIGHT(56)
#define REAP_HELD_160 REAP_HELD_128, REAP_EIGHT(64), REAP_EIGHT(72)
#define REAP_HELD_192 REAP_HELD_160, REAP_EIGHT(80), REAP_EIGHT(88)
#define REAP_HELD_224 REAP_HELD_192, REAP_EIGHT(96), REAP_EIGHT(104)
#define REAP_HELD_256 REAP_HELD_224, REAP_EIGHT(112), REAP_EIGHT(120)
#define REAP_WGMMA(WIDTH, TYPE, A, B, ADD)                                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD                             \
                 ", 0;\n"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." TYPE "." TYPE \
                 " {" REAP_TEXT_##WIDTH "}, " A ", " B ", p, 1, 1, 0, 0;\n}\n"       \
                 : REAP_HELD_##WIDTH                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)))
// The operands after an accumulator of WIDTH / 2 registers are A, B and ADD.
#define REAP_PRODUCT(WIDTH, A, B, ADD)                   \
    if constexpr (N == WIDTH && std::is_same_v<T, bf16>) \
        REAP_WGMMA(WIDTH, "bf16", A, B, ADD);            \
    else if constexpr (N == WIDTH)                       \
    REAP_WGMMA(WIDTH, "f16", A, B, ADD)

template <class T, int N>
REAP_DEVICE void multiply_add(float (&d)[ACCUMULATOR], std::uint64_t a, std::uint64_t b, bool add) {
    static_assert(N % 32 == 0 && N > 0 && N <= 256);
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
    REAP_PRODUCT(32, "%16", "%17", "%18");
    REAP_PRODUCT(64, "%32", "%33", "%34");
    REAP_PRODUCT(96, "%48", "%49", "%50");
    REAP_PRODUCT(128, "%64", "%65", "%66");
    REAP_PRODUCT(160, "%80", "%81", "%82");
    REAP_PRODUCT(192, "%96", "%97", "%98");
    REAP_PRODUCT(224, "%112", "%113", "%114");
    REAP_PRODUCT(256, "%128", "%129", "%130");
}

#undef REAP_PRODUCT
#undef REAP_WGMMA
#undef REAP_EIGHT
#undef REAP_HELD_32
#undef REAP_TEXT_32
#undef REAP_HELD_64
#undef REAP_TEXT_64
#undef REAP_HELD_96
#undef REAP_TEXT_96
#undef REAP_HELD_128
#undef REAP_TEXT_128
#undef REAP_HELD_160
#undef REAP_TEXT_160
#undef REAP_HELD_192
#undef REAP_TEXT_192
#undef REAP_HELD_224
#undef REAP_TEXT_224
#undef REAP_HELD_256
#undef REAP_TEXT_256
#undef REAP_NAMES_0
#undef REAP_NAMES_1
#undef REAP_NAMES_2
#undef REAP_NAMES_3
#undef REAP_NAMES_4
#undef REAP_NAMES_5
#undef REAP_NAMES_6
#undef REAP_NAMES_7
#undef REAP_NAMES_8
#undef REAP_NAMES_9
#undef REAP_NAMES_10
#undef REAP_NAMES_11
#undef REAP_NAMES_12
#undef REAP_NAMES_13
#undef REAP_NAMES_14
#undef REAP_NAMES_15

}  // namespace reap
