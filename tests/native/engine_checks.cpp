// Whole models on the engine.

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <stdexcept>
#include <thread>
#include <tuple>

#include "checks.h"
#include "models.h"

#if defined(__SANITIZE_ADDRESS__)  // Clang has a header for it, GCC has not
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));
#endif

namespace test {
namespace {

using vtp_cpu::Call;
using vtp_cpu::Parallel;
using vtp_cpu::Workspace;

constexpr int64_t kTokens = 19;  // of models that get tokens

std::vector<Shape> shapes() {
  std::vector<Shape> out;
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    out.push_back({"odd",
                   dtype,
                   37,
                   5,
                   {{17, {5, 5, 5}, {1, 7, 15}, false, 21, 61, false}, {37, {5}, {37}, false, 37, 1, false}},
                   3,
                   6,
                   10,
                   2,
                   5,
                   1,
                   1,
                   10});
    out.push_back({"dead-parts",
                   dtype,
                   15,
                   7,
                   {{0, {}, {}, false, 0, 0, true}, {9, {7}, {3}, false, 0, 0, false}, {0, {}, {}, false, 1, 17, false}},
                   1,
                   4,
                   4,
                   2,
                   2,
                   2,
                   2,
                   3});
    out.push_back(
        {"head-norms", dtype, 33, 15, {{33, {15, 15}, {15, 2}, true, 30, 115, false}}, 2, 12, 12, 3, 3, 1, 1, 17});
    out.push_back({"no-blocks", dtype, 16, 0, {}, 1, 8, 8, 4, 4, 0, 1, 1});
    out.push_back({"long", dtype, 48, 16, {{40, {16, 16}, {16, 11}, false, 48, 770, false}}, 1, 12, 23, 2, 1, 1, 1, 5});
    out.push_back({"tokens", dtype, 61, 6, {{50, {6, 6, 6}, {5, 4, 6}, false, 61, 37, true}}, 0, 0, 0, 0, 0, 0, 0, 0});
    out.push_back({"width-one", dtype, 1, 1, {{1, {1}, {1}, false, 1, 1, true}}, 1, 1, 1, 1, 1, 0, 1, 1});
    // The widest key is not of the head with the widest values, and one is wider than a dense head.
    out.push_back({"key-widths",
                   dtype,
                   61,
                   37,
                   {{50, {1, 37, 16, 7}, {20, 5, 4, 6}, false, 61, 37, false},
                    {61, {15, 64}, {64, 1}, false, 0, 0, false},
                    {7, {17}, {3}, false, 5, 5, true}},
                   1,
                   12,
                   12,
                   3,
                   3,
                   1,
                   1,
                   5});
    // Heads with one table in common, with one of their own and with none; SwiGLU of odd widths.
    out.push_back({"rotary",
                   dtype,
                   61,
                   38,
                   {{50, {38, 7, 38, 38}, {5, 4, 6, 38}, false, 61, 37, true, true, {0, -1, 2, 0}},
                    {61, {38}, {64}, true, 15, 1, false, true, {1}}},
                   0,
                   0,
                   0,
                   0,
                   0,
                   0,
                   0,
                   0,
                   2});
    out.push_back(
        {"swiglu",
         dtype,
         33,
         15,
         {{33, {15, 15}, {15, 2}, false, 30, 115, false, true}, {0, {}, {}, false, 33, 48, false, true}},
         2,
         12,
         12,
         3,
         3,
         1,
         1,
         17});
    // Norms before proj and fc2: of odd widths, of all columns, of one, and one of the two alone.
    out.push_back({"inner-norms",
                   dtype,
                   33,
                   15,
                   {{33, {15, 15}, {15, 2}, true, 30, 115, false, true, {}, 7, 61},
                    {20, {4, 9}, {3, 16}, false, 33, 48, false, false, {}, 19, 1},
                    {20, {4}, {21}, false, 7, 301, false, true, {}, 0, 301}},
                   2,
                   12,
                   12,
                   3,
                   3,
                   1,
                   1,
                   17});
  }
  return out;
}

std::string name_of(const char* check, const Shape& s) {
  return std::string(check) + " " + current.name + " " + s.name +
         (s.dtype == Dtype::kBFloat16 ? " bf16" : " f32");
}

int64_t input_size(const Shape& s) {
  return s.whole() ? s.channels * s.height * s.width : kTokens * s.embed_dim;
}
int64_t output_size(const Shape& s) { return s.whole() ? s.classes : kTokens * s.embed_dim; }

Numbers random_input(const Shape& s, int64_t bytes, int64_t images) {
  Random random(2);
  Numbers out(images * input_size(s), bytes);
  for (int64_t i = 0; i < images * input_size(s); ++i) out.set(i, random.normal());
  return out;
}

void read(Workspace& workspace, const Packed& packed) {
  workspace.model.read(packed.layout.data(), static_cast<int64_t>(packed.layout.size()), packed.bytes(),
                       packed.size);
}

// Of `images` images, which are all of `input`, in the input's dtype.
Numbers run_engine(Workspace& workspace, const Packed& packed, const Shape& s, const Numbers& input,
                   int64_t images, int64_t threads, Parallel parallel,
                   int64_t cache = vtp_cpu::second_level_cache()) {
  read(workspace, packed);
  Numbers output(images * output_size(s), input.bytes());
  const bool half = input.bytes() == 2;
  const std::vector<float> rotary = rotary_tables(s.tables(), kTokens, s.head_dim);
  const Call call{input.memory().data(), half, images,       s.whole() ? 0 : kTokens,
                  output.data(),         half, rotary.data()};
  vtp_cpu::run(workspace, call, threads, parallel, cache);
  return output;
}

// ------------------------------------------------------------------------------------------------- threads

void on_one_thread(int64_t, void (*body)(void*), void* context) { body(context); }

void one_after_another(int64_t threads, void (*body)(void*), void* context) {
  for (int64_t i = 0; i < threads; ++i) body(context);
}

template <class Wait>
void on_threads_that(const Wait& wait, int64_t threads, void (*body)(void*), void* context) {
  std::vector<std::thread> all;
  for (int64_t i = 1; i < threads; ++i)
    all.emplace_back([=] {
      wait(i);
      body(context);
    });
  body(context);
  for (std::thread& thread : all) thread.join();
}

void on_threads(int64_t threads, void (*body)(void*), void* context) {
  on_threads_that([](int64_t) {}, threads, body, context);
}

// All but one come when the work is under way, or done.
void some_late(int64_t threads, void (*body)(void*), void* context) {
  const auto wait = [](int64_t i) { std::this_thread::sleep_for(std::chrono::microseconds(200 * i * i)); };
  on_threads_that(wait, threads, body, context);
}

void more_than_asked_for(int64_t threads, void (*body)(void*), void* context) {
  on_threads(threads + 2, body, context);
}

// -------------------------------------------------------------------------------------------------- results

std::vector<double> expected_results(const PlainModel& model, const Numbers& input, int64_t images) {
  const Shape& s = model.shape();
  std::vector<double> out;
  for (int64_t i = 0; i < images; ++i) {
    std::vector<double> one;
    for (int64_t j = 0; j < input_size(s); ++j) one.push_back(input.get(i * input_size(s) + j));
    if (s.whole()) {
      const std::vector<double> logits = model.logits(one.data());
      out.insert(out.end(), logits.begin(), logits.end());
      continue;
    }
    Tokens x;
    for (auto at = one.begin(); at != one.end(); at += s.embed_dim) x.emplace_back(at, at + s.embed_dim);
    for (const std::vector<double>& row : model.through_blocks(x))
      out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

// The same for every instruction set, and slow.
const std::vector<double>& expected_once(const PlainModel& model, const Numbers& input, int64_t images) {
  static std::map<std::tuple<std::string, Dtype, int64_t>, std::vector<double>> known;
  std::vector<double>& out = known[{model.shape().name, model.shape().dtype, input.bytes()}];
  if (out.empty()) out = expected_results(model, input, images);
  return out;
}

void check_model(const Shape& s, int64_t bytes) {
  const int64_t images = 3;
  const PlainModel model(s, 7);
  const Packed packed(model);
  const Numbers input = random_input(s, bytes, images);
  Workspace workspace;
  const Numbers got = run_engine(workspace, packed, s, input, images, 2, on_threads);
  const std::vector<double>& expected = expected_once(model, input, images);
  double largest = 0;
  for (double x : expected) largest = std::fmax(largest, std::fabs(x));
  // Kernels are held to their last bit elsewhere: this is about which numbers meet.
  const double allowed = vtp_cpu::kernels(s.dtype).activation_bytes == 2 ? 5e-2 : 1e-5;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double stored = bytes == 2 ? kBFloat16Eps * std::fabs(expected[i]) : 0.0;
    expect_close(got.get(static_cast<int64_t>(i)), expected[i], allowed * largest + stored,
                 name_of("model", s));
  }
}

// More images than are computed at once on one thread.
int64_t many(const Shape& s) { return s.patches() > 100 ? 4 : 23; }

}  // namespace

void check_models() {
  static const Kernels* checked = nullptr;  // two sets may have their kernels for float32 in common
  static int64_t set = 0;
  int64_t shape = 0;
  for (const Shape& s : shapes()) {
    for (int64_t bytes : {4, 2})
      if ((s.dtype == Dtype::kBFloat16 || current.float32 != checked) &&
          has_its_turn(set + shape + bytes / 2, 2))
        check_model(s, bytes);
    ++shape;
  }
  checked = current.float32;
  ++set;
}

// Bits do not depend on what else is in the batch.
void check_batches() {
  for (const Shape& s : shapes()) {
    const Packed packed(PlainModel(s, 9));
    const Numbers input = random_input(s, 4, many(s));
    Workspace workspace;
    const std::vector<char> together =
        run_engine(workspace, packed, s, input, many(s), 1, on_one_thread).memory();
    for (int64_t i = 0; i < many(s); ++i) {
      Numbers one(input_size(s), 4);
      for (int64_t j = 0; j < input_size(s); ++j) one.set(j, input.get(i * input_size(s) + j));
      const std::vector<char> out = run_engine(workspace, packed, s, one, 1, 2, on_threads).memory();
      expect(std::equal(out.begin(), out.end(), together.begin() + static_cast<int64_t>(out.size()) * i),
             name_of("batches", s) + ": other bits in a batch");
    }
  }
}

// Bits do not depend on the number of threads or on when they come.
void check_threads() {
  for (const Shape& s : shapes()) {
    const Packed packed(PlainModel(s, 9));
    const Numbers input = random_input(s, 4, many(s));
    Workspace workspace;
    const auto run = [&](int64_t threads, Parallel parallel) {
      return run_engine(workspace, packed, s, input, many(s), threads, parallel).memory();
    };
    const std::vector<char> alone = run(1, on_one_thread);
    for (int64_t threads : {1, 2, 5})
      for (Parallel parallel : {on_one_thread, on_threads, some_late, one_after_another, more_than_asked_for})
        expect(run(threads, parallel) == alone,
               name_of("threads", s) + ": other bits on " + std::to_string(threads) + " threads");
  }
}

// What is computed at once, by the rule of engine.cpp.
void check_cache_rule() {
  const int64_t kilobyte = 1 << 10, megabyte = 1 << 20;
  const struct {
    int64_t cache, rows, panels;
  } cases[] = {{0, 51, 4},
               {256 * kilobyte, 102, 4},
               {512 * kilobyte, 200, 4},
               {megabyte, 200, 4},
               {5 * megabyte / 4, 250, 4},
               {2 * megabyte, 400, 8},
               {3 * megabyte, 600, 12},
               {4 * megabyte, 800, 16},
               {12 * megabyte, 800, 16}};
  for (const auto& c : cases) {
    const vtp_cpu::Blocks got = vtp_cpu::blocks_for(c.cache);
    expect(got.rows == c.rows && got.panels == c.panels,
           "blocks for " + text({c.cache}) + " bytes: got " + text({got.rows, got.panels}) + ", expected " +
               text({c.rows, c.panels}));
    const int64_t held = got.rows * (1024 + got.panels * kPanel * 4);
    expect(2 * held <= std::max(c.cache, megabyte / 8), "blocks for " + text({c.cache}) + " bytes do not fit");
  }
  expect(vtp_cpu::second_level_cache() > 0, "blocks: no second-level cache");
}

// Bits do not depend on the size of the cache either: of 556 rows in one block or many, of a layer of 66 panels.
void check_blocks() {
  check_cache_rule();
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    // The part: float32 where activations are, bfloat16 where they are.
    if (!has_its_turn(static_cast<int64_t>(dtype) + current.bfloat16->activation_bytes / 2, 2)) continue;
    const Shape s = {"wide", dtype, 9, 8, {{0, {}, {}, false, 7, 520, false, true}}, 1, 12, 23, 2, 1, 1, 1, 5};
    const int64_t images = 4;
    const Packed packed(PlainModel(s, 17));
    const Numbers input = random_input(s, 4, images);
    const auto run = [&](int64_t threads, int64_t cache) {
      Workspace workspace;  // with memory for this call alone
      const Parallel parallel = threads == 1 ? on_one_thread : on_threads;
      return run_engine(workspace, packed, s, input, images, threads, parallel, cache).memory();
    };
    const std::vector<char> expected = run(1, 1 << 20);
    int64_t turn = 0;
    for (int64_t cache : {256 << 10, 512 << 10, 1 << 20, 2 << 20, 3 << 20, 4 << 20}) {
      for (int64_t threads : {1, 2, 3, 4})
        if (has_its_turn(turn + threads, 4))
          expect(run(threads, cache) == expected, name_of("blocks", s) + ": other bits on " + text({threads}) +
                                                      " threads with a cache of " + text({cache}) + " bytes");
      ++turn;
    }
  }
}

// Several callers with a workspace each use the same weights.
void check_callers() {
  const Shape s = shapes()[0];
  const Packed packed(PlainModel(s, 11));
  const Numbers input = random_input(s, 4, 5);
  const auto run = [&] {
    Workspace workspace;
    return run_engine(workspace, packed, s, input, 5, 2, on_threads).memory();
  };
  const std::vector<char> expected = run();
  std::vector<std::thread> callers;
  std::vector<char> same(4, 0);
  for (size_t i = 0; i < 4; ++i) callers.emplace_back([&, i] { same[i] = run() == expected; });
  for (std::thread& caller : callers) caller.join();
  for (char good : same) expect(good, "several callers at once get other bits");
}

// ----------------------------------------------------------------------------------------------- allocation

#if defined(__SANITIZE_ADDRESS__)
namespace {
size_t allocations = 0;
void note_allocation(const volatile void*, size_t) { ++allocations; }
void note_nothing(const volatile void*) {}
}  // namespace

// After a call with the largest batch, calls with any up to it take no memory, reading the model included.
void check_steady() {
  __sanitizer_install_malloc_and_free_hooks(note_allocation, note_nothing);
  for (const Shape& s : shapes()) {
    const Packed packed(PlainModel(s, 13));
    const Numbers input = random_input(s, 4, 3);
    Numbers output(3 * output_size(s), 4);
    const std::vector<float> rotary = rotary_tables(s.tables(), kTokens, s.head_dim);
    Workspace workspace;
    const auto call = [&](int64_t images) {
      read(workspace, packed);
      const Call one{input.memory().data(), false, images,       s.whole() ? 0 : kTokens,
                     output.data(),         false, rotary.data()};
      vtp_cpu::run(workspace, one, 2, on_one_thread);
    };
    call(3);
    const size_t before = allocations;
    for (int64_t images : {3, 1, 3, 2}) call(images);
    const size_t more = allocations - before;
    expect(more == 0, name_of("steady", s) + ": four calls took memory " + std::to_string(more) + " times");
  }
}
#else
void check_steady() { expect(false, "steady: only a build with AddressSanitizer counts allocations"); }
#endif

// -------------------------------------------------------------------------------------------- garbled models

namespace {

int64_t garbled_number(int64_t old, Random& random) {
  const int64_t odd[] = {0,
                         1,
                         -1,
                         2,
                         old ^ 1,
                         old ^ 2,
                         old ^ 4,
                         old ^ 16,
                         ~old,
                         1 << 24,
                         1 << 25,
                         int64_t{1} << 31,
                         INT64_MAX,
                         INT64_MIN,
                         int64_t{1} << 62,
                         random.below(100)};
  return odd[random.below(16)];
}

std::vector<int64_t> garbled(std::vector<int64_t> layout, Random& random) {
  for (int64_t changes = 1 + random.below(3); changes > 0 && !layout.empty(); --changes) {
    const auto at = layout.begin() + random.below(static_cast<int64_t>(layout.size()));
    switch (random.below(5)) {
      case 0:
        layout.erase(at);
        break;
      case 1:
        layout.insert(at, garbled_number(*at, random));
        break;
      case 2:
        layout.erase(at, layout.end());
        break;
      default:
        *at = garbled_number(*at, random);
    }
  }
  return layout;
}

// A list that is not refused may give any numbers, but stays within its memory.
bool runs(const std::vector<int64_t>& layout, const char* bytes, int64_t size) {
  Workspace workspace;
  vtp_cpu::Model& m = workspace.model;
  try {
    m.read(layout.data(), static_cast<int64_t>(layout.size()), bytes, size);
  } catch (const std::exception&) {
    return false;
  }
  const int64_t images = 2, tokens = 3;
  const int64_t in = m.from_images ? m.channels * m.height * m.width : tokens * m.embed_dim;
  if (m.from_images != m.to_logits || in > 1 << 16 || m.tables > 1 << 10)
    return true;  // no operator runs the one, the others take long
  Numbers input(images * in, 4), output(images * (m.from_images ? m.head.outputs : tokens * m.embed_dim), 4);
  const std::vector<float> rotary = rotary_tables(m.tables, tokens, m.tables ? m.head_dim : 0);
  const int64_t given = m.from_images ? 0 : tokens;
  vtp_cpu::run(workspace, {input.data(), false, images, given, output.data(), false, rotary.data()}, 2,
               on_one_thread);
  return true;
}

bool runs(const std::vector<int64_t>& layout, const std::vector<char>& bytes) {
  return runs(layout, bytes.data(), static_cast<int64_t>(bytes.size()));
}
bool runs(const PlainModel& model) {
  const Packed packed(model);
  return runs(packed.layout, packed.bytes(), packed.size);
}

}  // namespace

void check_garbled() {
  for (const Shape& s : shapes()) {
    const Packed packed(PlainModel(s, 15));
    const std::vector<char> bytes(static_cast<size_t>(packed.size), '\0');  // zeros are good indices
    Random random(16);
    int refused = 0;
    for (int i = 0; i < 200; ++i) refused += !runs(garbled(packed.layout, random), bytes);
    expect(refused > 100,
           name_of("garbled", s) + ": only " + std::to_string(refused) + " of 200 are refused");
    for (int64_t left : {int64_t{0}, packed.size / 2, packed.size - 64})
      expect(!runs(packed.layout, std::vector<char>(static_cast<size_t>(left))),
             name_of("garbled", s) + ": runs on " + std::to_string(left) + " bytes");
  }
}

// Models that are written down well but make no sense.
void check_wrong() {
  const Shape good = shapes()[0];
  Shape pooled = good, patches = good;
  pooled.pooled = good.prefix + good.patches() + 1;
  patches.height += 1;
  expect(runs(PlainModel(good, 1)), "wrong: the good model is refused");
  expect(!runs(PlainModel(pooled, 1)), "wrong: pools more tokens than there are");
  expect(!runs(PlainModel(patches, 1)), "wrong: patches do not fill the image");
  Shape norms = good;
  norms.blocks[0].head_norms = true;
  expect(runs(PlainModel(norms, 1)), "wrong: norms of heads are refused");
  norms.blocks[0].key_widths[1] = norms.head_dim - 1;
  expect(!runs(PlainModel(norms, 1)), "wrong: a key is narrower than its norm");
  Shape rotary = good;
  rotary.channels = 0;  // tokens in and out
  rotary.head_dim = 6;
  rotary.blocks = {{17, {6, 5}, {1, 7}, false, 21, 61, false, true, {3, -1}}};
  expect(runs(PlainModel(rotary, 1)), "wrong: rotary embeddings are refused");
  rotary.blocks[0].tables = {3, 0};
  expect(!runs(PlainModel(rotary, 1)), "wrong: a narrow key is rotated");
  rotary.blocks[0].key_widths = {5, 5};
  rotary.head_dim = 5;
  expect(!runs(PlainModel(rotary, 1)), "wrong: a key of odd width is rotated");
  rotary.blocks[0].tables = {-2, -1};
  expect(!runs(PlainModel(rotary, 1)), "wrong: a table before the first");
  Shape images = good;
  images.head_dim = 6;
  images.blocks = {{17, {6}, {1}, false, 21, 61, false, false, {0}}};
  expect(!runs(PlainModel(images, 1)), "wrong: a whole model is rotated");
  rotary.blocks[0].tables = {};
  Packed halves{PlainModel(rotary, 1)};
  expect(runs(halves.layout, halves.bytes(), halves.size), "wrong: SwiGLU is refused");
  const int64_t fc1[] = {21, 128};  // inputs, and outputs: twice 61, in whole panels
  std::search(halves.layout.begin(), halves.layout.end(), fc1, fc1 + 2)[1] = 96;
  expect(!runs(halves.layout, halves.bytes(), halves.size), "wrong: half of a hidden unit is missing");
  Shape inner = good;
  inner.blocks = {{17, {5}, {9}, false, 21, 61, false, true, {}, 9, 40}};
  Packed gathers{PlainModel(inner, 1)};
  expect(runs(gathers.layout, gathers.bytes(), gathers.size), "wrong: a norm before fc2 is refused");
  const int64_t all_values[] = {1, 9, 0};  // there is a norm before proj, of all nine
  std::search(gathers.layout.begin(), gathers.layout.end(), all_values, all_values + 3)[1] = 10;
  expect(!runs(gathers.layout, gathers.bytes(), gathers.size), "wrong: more values than there are are kept");
  for (int64_t index : {int64_t{-1}, good.embed_dim, int64_t{INT32_MAX}, int64_t{INT32_MIN}}) {
    PlainModel model(good, 1);
    model.spoil_index(static_cast<int32_t>(index));
    expect(!runs(model), "wrong: reads column " + std::to_string(index));
  }
}

// A short list that claims to hold a lot does not make the reader take memory for it.
void check_claims() {
  const std::vector<int64_t> blocks = {6, 0, 8, 4, 0, 0, 0, 0, 1 << 24};
  const std::vector<int64_t> heads = {6, 0, 8, 4, 0, 0, 0, 0, 1, 0, 1, 8, 0, 1 << 24};
  for (const std::vector<int64_t>& layout : {heads, blocks}) {
    rusage before{}, after{};
    getrusage(RUSAGE_SELF, &before);
    const bool refused = !runs(layout, nullptr, 0);
    getrusage(RUSAGE_SELF, &after);
    const int64_t megabytes = (after.ru_maxrss - before.ru_maxrss) >> 10;
    expect(refused && megabytes < 16, "a list of " + std::to_string(layout.size()) + " numbers took " +
                                          std::to_string(megabytes) + " MB to refuse");
  }
}

}  // namespace test
