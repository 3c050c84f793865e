// The scheduler behind emu.h. One launch at a time, on the calling thread; every CUDA thread of a block is a fiber
// (ucontext) with its own stack, blocks run one after the other.
#include "emu.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../cuda/mutate.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastdiff {
namespace emu {

Position here;
int mutation = 0;
int64_t grid_limit = 0x7fffffff;
int multiprocessors = 4;
bool hopper = false;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kWarp = 32;
// Shared memory of one block, static and dynamic together: what every architecture gives that kernels without features
// of sm_90 run on (the least: sm_86 and sm_89), and sm_90.
constexpr size_t kSharedAnywhere = 99 << 10, kSharedSm90 = 227 << 10;

enum State { kReady, kAtBarrier, kAtClusterBarrier, kAtCollective, kAtCondition, kReturned };

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& o) const { return line == o.line && strcmp(file, o.file) == 0; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

struct Copy {
  void* to;
  std::vector<char> bytes;  // as they were when the copy was asked for
};

constexpr uint32_t kPoison = 0xffb1ffb1u;  // NaN as float32, as two float16 and as two bfloat16

void poison(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<char*>(p)[i] = reinterpret_cast<const char*>(&kPoison)[i % 4];
}

struct Product {
  float* d;
  std::vector<float> sum;  // the accumulators that nobody may look at yet
  std::function<void(float*)> compute;
  bool done;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 thread, block;
  int rank = 0;  // of its block in the cluster
  State state = kReady;
  Site site;          // where it waits
  unsigned mask = 0;  // of the collective it waits in
  int source = 0;
  uint64_t value = 0;                     // brought to, then taken from, the collective
  size_t blob = 0;                        // bytes at `value`, for a gather
  std::vector<std::vector<Copy>> copies;  // in flight: groups, the last of them still open
  std::vector<std::vector<Product>> products;
  std::function<bool()> condition;
};

struct Warp {
  unsigned ready = 0;    // lanes
  unsigned waiting = 0;  // lanes in a collective
  std::vector<unsigned char> gathered = std::vector<unsigned char>(kWarp * kBlob);
};

struct Scheduler {
  std::mutex mutex;
  uint64_t random = 1;
  bool lockstep = false;
  int64_t switches = 0;

  std::vector<Fiber> fibers;  // grown as needed, never shrunk: stacks are reused
  std::vector<Warp> warps;
  int threads = 0;  // of a block
  int blocks = 1;   // that run together: a cluster
  Fiber* running = nullptr;
  ucontext_t host;
  const void* host_stack = nullptr;
  size_t host_stack_size = 0;
  const std::function<void()>* body = nullptr;
  size_t shared_limit = kSharedAnywhere;
  std::string kernel;  // launched last
  std::string instantiation;
  bool recording = false;
  std::string records;
  std::string error;
  std::vector<std::function<void()>> boxes;  // copies of the copy engine in flight
  int at_condition = 0;                      // fibers
  // By rank and number of the barrier: threads there, how often it was passed.
  std::map<std::pair<int, int>, std::pair<int, int>> meeting;
  std::map<std::pair<int, const void*>, std::pair<void*, size_t>> shared_arrays;  // by rank and tag
  std::vector<size_t> shared_bytes;                                               // by rank
  std::vector<int> order;  // in which the blocks of a cluster pass barriers of their own

  Scheduler() {
    const char* text = getenv("FASTDIFF_EMU_SEED");
    random = text != nullptr ? strtoull(text, nullptr, 10) : 0;
  }
  ~Scheduler() {
    for (Fiber& f : fibers)
      if (f.stack != nullptr) munmap(f.stack, kStack);
  }

  uint32_t draw(uint32_t below) {  // splitmix64
    uint64_t z = (random += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>((z ^ (z >> 31)) >> 32) % below;
  }

  void draw_order() {
    order.resize(blocks);
    std::iota(order.begin(), order.end(), 0);
    for (int i = blocks - 1; i > 0 && !lockstep; --i) std::swap(order[i], order[draw(static_cast<uint32_t>(i + 1))]);
  }

  int index(const Fiber& f) const { return static_cast<int>(&f - fibers.data()); }
  void set_ready(Fiber& f) { f.state = kReady, warps[index(f) / kWarp].ready |= 1u << index(f) % kWarp; }

  int first(int rank) const { return rank * ((threads + kWarp - 1) / kWarp * kWarp); }  // fiber of a block
  template <typename F>
  void each(F f) {  // f(fiber) for every thread
    for (int rank = 0; rank < blocks; ++rank)
      for (int i = 0; i < threads; ++i) f(fibers[first(rank) + i]);
  }
  void* allocate_shared(int rank, const void* tag, size_t bytes);
  std::string too_much_shared(size_t bytes) const;
  void free_shared();
  void start(Fiber* f);
  void resume(Fiber* f);
  void wait(State state, const Site& site);
  void fail(const std::string& what);
  void run_ready();
  bool look_around();
  void run_warp(int warp, int burst);
  void release_barrier();
  std::string who_waits();
  void run_cluster(const std::vector<dim3>& positions);
};

Scheduler& scheduler() {
  static Scheduler s;
  return s;
}

// Leaves the fiber for ever: on return, or after an error.
void leave() {
  Scheduler& s = scheduler();
  Fiber* f = s.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, s.host_stack, s.host_stack_size);  // null: its fake stack is freed
#endif
  swapcontext(&f->context, &s.host);
  abort();
}

void fiber_main() {
  Scheduler& s = scheduler();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.host_stack, &s.host_stack_size);
#endif
  (*s.body)();
  for (const auto& group : s.running->copies)
    if (!group.empty()) s.fail("a thread returns with copies in flight");
  s.running->copies.clear();
  for (const auto& group : s.running->products)
    if (!group.empty()) s.fail("a thread returns with products in flight");
  s.running->products.clear();
  s.running->state = kReturned;
  leave();
}

void Scheduler::start(Fiber* f) {
  if (f->stack == nullptr) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for a stack");
    f->stack = static_cast<char*>(p);
    mprotect(f->stack, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);  // an overflow faults
  }
#if defined(__SANITIZE_ADDRESS__)
  // The last fiber here left in the middle of fiber_main, or, after an error, of the kernel.
  const size_t stale = f->state == kReturned ? 4096 : kStack;
  __asan_unpoison_memory_region(f->stack + kStack - stale, stale);
#endif
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = kStack;
  f->context.uc_link = nullptr;
  makecontext(&f->context, fiber_main, 0);
  f->fake_stack = nullptr;
  f->copies.clear();
  f->products.clear();
  set_ready(*f);
}

void Scheduler::resume(Fiber* f) {
  ++switches;
  running = f;
  here.thread = f->thread, here.block = f->block;
  warps[index(*f) / kWarp].ready &= ~(1u << index(*f) % kWarp);
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f->stack, kStack);
#endif
  swapcontext(&host, &f->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  running = nullptr;
}

void Scheduler::wait(State state, const Site& site) {
  Fiber* f = running;
  f->state = state, f->site = site;
  if (state == kAtCollective) {  // the last lane to arrive completes it
    Warp& warp = warps[index(*f) / kWarp];
    Fiber* const lanes = &fibers[index(*f) / kWarp * kWarp];
    warp.waiting |= 1u << index(*f) % kWarp;
    bool complete = (warp.waiting & f->mask) == f->mask;
    for (int i = 0; i < kWarp && complete; ++i)
      if (f->mask >> i & 1) complete = lanes[i].mask == f->mask && lanes[i].site == f->site;
    if (complete) {
      uint64_t brought[kWarp];
      for (int i = 0; i < kWarp; ++i) {
        if ((f->mask >> i & 1) == 0) continue;
        brought[i] = lanes[i].value;
        if (lanes[i].blob > 0)
          memcpy(&warp.gathered[i * kBlob], reinterpret_cast<const void*>(lanes[i].value), lanes[i].blob);
      }
      warp.waiting &= ~f->mask;
      for (int i = 0; i < kWarp; ++i)
        if (f->mask >> i & 1) lanes[i].value = brought[lanes[i].source], set_ready(lanes[i]);
    }
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f->fake_stack, host_stack, host_stack_size);
#endif
  swapcontext(&f->context, &host);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f->fake_stack, &host_stack, &host_stack_size);
#endif
}

void Scheduler::fail(const std::string& what) {
  error = what;
  leave();
}

void Scheduler::run_warp(int warp, int burst) {
  for (; burst > 0 && warps[warp].ready != 0 && error.empty(); --burst) {
    unsigned ready = warps[warp].ready;
    for (uint32_t skip = draw(static_cast<uint32_t>(__builtin_popcount(ready))); skip > 0; --skip) ready &= ready - 1;
    resume(&fibers[warp * kWarp + __builtin_ctz(ready)]);
  }
}

void Scheduler::run_ready() {
  if (lockstep) {
    for (size_t w = 0; w < warps.size(); ++w)
      for (unsigned round = warps[w].ready; round != 0 && error.empty(); round &= round - 1)
        resume(&fibers[w * kWarp + __builtin_ctz(round)]);
    return;
  }
  std::vector<int> candidates;
  for (size_t w = 0; w < warps.size(); ++w)
    if (warps[w].ready != 0) candidates.push_back(static_cast<int>(w));
  if (!candidates.empty()) run_warp(candidates[draw(static_cast<uint32_t>(candidates.size()))], 1 + draw(4 * kWarp));
}

std::string Scheduler::who_waits() {
  std::map<std::string, int> groups;
  each([&](const Fiber& f) {
    char mask[16];
    snprintf(mask, sizeof mask, "%08x", f.mask);
    if (f.state == kReturned)
      ++groups["have returned"];
    else if (f.state == kAtBarrier)
      ++groups["wait at the barrier " + f.site.text()];
    else if (f.state == kAtClusterBarrier)
      ++groups["wait for the cluster at " + f.site.text()];
    else if (f.state == kAtCondition)
      ++groups["wait for a phase or named barrier at " + f.site.text()];
    else
      ++groups["wait in a warp operation for lanes " + std::string(mask) + " at " + f.site.text()];
  });
  std::string text;
  for (const auto& g : groups) text += (text.empty() ? "" : ", ") + std::to_string(g.second) + " threads " + g.first;
  return text;
}

void Scheduler::release_barrier() {
  bool released = false;
  for (const int rank : order) {
    Fiber* const block = &fibers[first(rank)];
    bool all = true;
    for (int i = 0; i < threads; ++i) all = all && block[i].state == kAtBarrier && block[i].site == block[0].site;
    if (!all) continue;
    for (int i = 0; i < threads; ++i) set_ready(block[i]);
    released = true;
    if (!lockstep) break;  // this block alone goes on, as far as it can without the others
  }
  bool together = true;
  each([&](const Fiber& f) { together = together && f.state == kAtClusterBarrier && f.site == fibers[0].site; });
  if (together) {
    each([&](Fiber& f) { set_ready(f); });
    draw_order();
  }
  if (!released && !together) error = "threads wait for each other for ever: " + who_waits();
}

// Lets copies arrive, and wakes the threads whose condition holds. False: nothing has changed.
bool Scheduler::look_around() {
  bool changed = false;
  bool idle = true;
  for (const Warp& w : warps) idle = idle && w.ready == 0;
  if (!boxes.empty() && (idle || draw(4) == 0)) {
    const size_t i = lockstep ? 0 : draw(static_cast<uint32_t>(boxes.size()));
    const std::function<void()> copy = std::move(boxes[i]);
    boxes.erase(boxes.begin() + static_cast<std::ptrdiff_t>(i));
    copy();
    changed = true;
  }
  if (at_condition == 0) return changed;
  each([&](Fiber& f) {
    if (f.state != kAtCondition || !f.condition()) return;
    --at_condition, changed = true;
    set_ready(f);
  });
  return changed;
}

void* Scheduler::allocate_shared(int rank, const void* tag, size_t bytes) {
  auto& entry = shared_arrays[{rank, tag}];
  if (entry.first == nullptr) {
    // As aligned as the widest swizzle pattern, at its exact size.
    if (posix_memalign(&entry.first, 1024, bytes) != 0) abort();
    entry.second = bytes;
    shared_bytes[rank] += bytes;
    poison(entry.first, bytes);
  }
  return entry.first;
}

std::string Scheduler::too_much_shared(size_t bytes) const {
  return "asks for " + std::to_string(bytes) + " bytes of shared memory per block, where " +
         std::to_string(shared_limit) + " are allowed (" +
         (shared_limit == kSharedSm90 ? "sm_90" : "sm_86 and sm_89; 232448 for kernels of sm_90") + ")";
}

void Scheduler::free_shared() {
  for (auto& entry : shared_arrays) free(entry.second.first);
  shared_arrays.clear();
}

void Scheduler::run_cluster(const std::vector<dim3>& positions) {
  warps.assign(first(blocks) / kWarp, Warp());
  for (int rank = 0; rank < blocks; ++rank)
    for (int i = 0; i < threads; ++i) {
      const dim3& d = here.block_dim;
      Fiber& f = fibers[first(rank) + i];
      f.thread = dim3(i % d.x, i / d.x % d.y, i / d.x / d.y);
      f.block = positions[rank], f.rank = rank;
      start(&f);
    }
  const auto any = [&](auto test) {
    for (const Warp& w : warps)
      if (test(w)) return true;
    return false;
  };
  at_condition = 0;
  meeting.clear(), boxes.clear();
  draw_order();
  while (error.empty()) {
    const bool changed = look_around();
    if (any([](const Warp& w) { return w.ready != 0; })) {
      run_ready();
      continue;
    }
    if (changed) continue;
    bool done = true;
    each([&](const Fiber& f) { done = done && f.state == kReturned; });
    if (done) break;
    release_barrier();
  }
}

}  // namespace

void seed(uint64_t value) { scheduler().random = value; }
void set_lockstep(bool on) { scheduler().lockstep = on; }
int64_t switches() { return scheduler().switches; }
const char* last_kernel() { return scheduler().kernel.c_str(); }
const char* recorded() { return scheduler().records.c_str(); }
void name_launch(const char* instantiation, const char* file) {
  scheduler().instantiation = std::string(file) + "\t" + instantiation;
}
void record(bool on) {
  Scheduler& s = scheduler();
  if (on) s.records.clear();
  s.recording = on;
}

void* shared(const void* tag, size_t bytes) {
  Scheduler& s = scheduler();
  const int rank = s.running->rank;
  void* p = s.allocate_shared(rank, tag, bytes);
  if (s.shared_bytes[rank] > s.shared_limit) s.fail(s.too_much_shared(s.shared_bytes[rank]));
  return p;
}
void* dynamic_shared() {
  Scheduler& s = scheduler();
  return s.shared_arrays[{s.running->rank, nullptr}].first;
}

int cluster_rank() { return scheduler().running->rank; }
void cluster_sync(const char* file, int line) { scheduler().wait(kAtClusterBarrier, {file, line}); }

void* shared_of(const void* mine, int rank) {
  Scheduler& s = scheduler();
  if (rank < 0 || rank >= s.blocks) s.fail("a block of the cluster that is not there");
  for (const auto& entry : s.shared_arrays) {
    const char* const base = static_cast<const char*>(entry.second.first);
    const char* const p = static_cast<const char*>(mine);
    if (entry.first.first != s.running->rank || p < base || p >= base + entry.second.second) continue;
    return static_cast<char*>(s.allocate_shared(rank, entry.first.second, entry.second.second)) + (p - base);
  }
  s.fail("shared memory of another block is sought by an address that is not in this one's");
  return nullptr;
}

void fault(const char* what) { scheduler().fail(what); }

void syncthreads(const char* file, int line) { scheduler().wait(kAtBarrier, {file, line}); }

uint64_t collective(unsigned mask, uint64_t value, int source, const char* file, int line) {
  Scheduler& s = scheduler();
  Fiber* f = s.running;
  const Site site{file, line};
  if ((mask >> lane() & 1) == 0) s.fail("a lane calls a warp operation whose mask does not name it, at " + site.text());
  if ((mask >> source & 1) == 0) s.fail("a lane reads from one that the mask does not name, at " + site.text());
  f->mask = mask, f->source = source, f->value = value, f->blob = 0;
  s.wait(kAtCollective, site);
  return f->value;
}

const unsigned char* gather(unsigned mask, const void* mine, size_t bytes, const char* file, int line) {
  Scheduler& s = scheduler();
  Fiber* f = s.running;
  if (bytes > kBlob) s.fail("a lane brings more than a gather takes");
  if ((mask >> lane() & 1) == 0) s.fail("a lane calls a warp operation whose mask does not name it");
  f->mask = mask, f->source = lane(), f->value = reinterpret_cast<uint64_t>(mine), f->blob = bytes;
  s.wait(kAtCollective, {file, line});
  return s.warps[s.index(*f) / kWarp].gathered.data();
}

unsigned ballot(unsigned mask, int predicate, const char* file, int line) {
  const unsigned char* all = gather(mask, &predicate, sizeof predicate, file, line);
  unsigned found = 0;
  for (int i = 0; i < kWarp; ++i)
    if ((mask >> i & 1) != 0 && all[i * kBlob] != 0) found |= 1u << i;
  return found;
}

void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
  auto& groups = scheduler().running->copies;
  if (groups.empty()) groups.emplace_back();
  std::vector<char> values(bytes);
  if (valid > 0) memcpy(values.data(), from, valid);
  poison(to, bytes);
  groups.back().push_back({to, std::move(values)});
}

void commit_copies() {
  auto& groups = scheduler().running->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait_copies(int groups_left) {
  auto& groups = scheduler().running->copies;
  while (static_cast<int>(groups.size()) > groups_left + 1) {  // the open group is never waited for
    for (const Copy& c : groups.front()) memcpy(c.to, c.bytes.data(), c.bytes.size());
    groups.erase(groups.begin());
  }
}

namespace {

// Of an mbarrier, packed into its 8 bytes.
struct Phase {
  uint16_t arrivals, missing;
  int32_t bytes : 31;
  uint32_t parity : 1;
};
static_assert(sizeof(Phase) == 8, "an mbarrier has 8 bytes");

Phase read_phase(const void* barrier) {
  Phase p;
  memcpy(&p, barrier, sizeof p);
  return p;
}
void write_phase(void* barrier, Phase p) {
  if (p.missing == 0 && p.bytes == 0) p.missing = p.arrivals, p.parity ^= 1u;
  memcpy(barrier, &p, sizeof p);
}

void wait_until(std::function<bool()> condition, const char* file, int line) {
  Scheduler& s = scheduler();
  if (condition() && s.draw(2) == 0) return;  // otherwise others may run first
  s.running->condition = std::move(condition);
  ++s.at_condition;
  s.wait(kAtCondition, {file, line});
}

}  // namespace

void init_barrier(void* barrier, int arrivals) {
  const auto n = static_cast<uint16_t>(arrivals);
  const Phase p = {n, n, 0, 0};
  memcpy(barrier, &p, sizeof p);
}

void arrive(void* barrier, int bytes_to_come) {
  Phase p = read_phase(barrier);
  if (p.missing == 0) fault("more threads arrive at a barrier than it was made for");
  --p.missing, p.bytes += bytes_to_come;
  write_phase(barrier, p);
}

void wait_phase(const void* barrier, int parity, const char* file, int line) {
  wait_until([=] { return read_phase(barrier).parity != static_cast<uint32_t>(parity); }, file, line);
}

void named_barrier(int number, int threads, const char* file, int line) {
  auto& place = scheduler().meeting[{scheduler().running->rank, number}];
  const int passed = place.second;
  if (++place.first == threads) {
    place.first = 0, ++place.second;
    return;
  }
  wait_until([&place, passed] { return place.second != passed; }, file, line);
}

uintptr_t swizzled(uintptr_t address, int span) {
  return span == 0 ? address : address ^ ((address >> 7 & (span / 16 - 1)) << 4);
}

void copy_box(const TensorMap& map, void* to, void* barrier, const int* at) {
  int64_t rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  const size_t row_bytes = 2 * static_cast<size_t>(map.box[0]);
  poison(to, row_bytes * rows);
  int64_t start[5];
  for (int i = 0; i < map.rank; ++i) start[i] = at[i];
  scheduler().boxes.push_back([=] {
    for (int64_t row = 0; row < rows; ++row) {
      int64_t rest = row, offset = 0;
      bool inside = true;
      for (int i = 1; i < map.rank; ++i) {
        const int64_t x = start[i] + rest % map.box[i];
        rest /= map.box[i];
        inside = inside && x >= 0 && x < map.size[i], offset += x * map.stride[i];
      }
      for (int j = 0; j < map.box[0]; ++j) {
        const int64_t x = start[0] + j;
        uint16_t value = 0;
        if (inside && x >= 0 && x < map.size[0]) memcpy(&value, map.data + offset + 2 * x, 2);
        const uintptr_t place = reinterpret_cast<uintptr_t>(to) + row * row_bytes + 2 * j;
        memcpy(reinterpret_cast<void*>(swizzled(place, map.span)), &value, 2);
      }
    }
    Phase p = read_phase(barrier);
    p.bytes -= static_cast<int32_t>(row_bytes * rows);
    write_phase(barrier, p);
  });
}

namespace {

void run(Product& p) {
  if (!p.done) p.compute(p.sum.data());
  p.done = true;
}

}  // namespace

void start_product(float* d, int count, std::function<void(float*)> compute) {
  Scheduler& s = scheduler();
  auto& groups = s.running->products;
  if (groups.empty()) groups.emplace_back();
  const bool at_once = s.draw(2) == 0;
  Product* before = nullptr;  // the product that these accumulators come from
  for (auto& group : groups)
    for (Product& p : group)
      if (p.d == d) before = &p;
  Product next = {d, std::vector<float>(d, d + count), std::move(compute), false};
  if (before != nullptr) {
    run(*before);
    next.sum = before->sum;
  }
  if (at_once) run(next);
  poison(d, count * sizeof(float));
  groups.back().push_back(std::move(next));
}

void commit_products() {
  auto& groups = scheduler().running->products;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

void wait_products(int groups_left) {
  auto& groups = scheduler().running->products;
  while (static_cast<int>(groups.size()) > groups_left + 1) {
    for (Product& p : groups.front()) run(p), memcpy(p.d, p.sum.data(), p.sum.size() * sizeof(float));
    groups.erase(groups.begin());
    for (const auto& group : groups)
      for (const Product& p : group) poison(p.d, p.sum.size() * sizeof(float));
  }
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t smem, const std::function<void()>& body, int cluster,
            bool sm90) {
  Scheduler& s = scheduler();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || cluster < 1 || cluster > 8 || grid.x % cluster != 0)
    throw std::runtime_error(std::string(kernel) + ": invalid configuration argument");
  s.shared_limit = sm90 || cluster > 1 ? kSharedSm90 : kSharedAnywhere;
  if (smem > s.shared_limit) throw std::runtime_error(std::string(kernel) + ": " + s.too_much_shared(smem));
  const std::string instantiation = std::move(s.instantiation);
  s.instantiation.clear();
  if (s.recording) {
    if (instantiation.empty()) throw std::runtime_error(std::string(kernel) + ": launched without a name (FD_LAUNCH)");
    s.records += instantiation;
    for (const dim3& d : {grid, block})
      s.records += "\t" + std::to_string(d.x) + " " + std::to_string(d.y) + " " + std::to_string(d.z);
    s.records += "\t" + std::to_string(smem) + "\t" + std::to_string(cluster) + "\n";
    s.kernel = kernel;
    return;
  }
  s.threads = static_cast<int>(threads), s.blocks = cluster;
  if (static_cast<int>(s.fibers.size()) < s.first(cluster)) s.fibers.resize(s.first(cluster));
  s.body = &body;
  s.error.clear();
  s.kernel = kernel;
  here.block_dim = block, here.grid_dim = grid;
  std::vector<uint64_t> order(blocks / cluster);  // a cluster: neighbours along x
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (!s.lockstep)
    for (uint64_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[s.draw(static_cast<uint32_t>(i + 1))]);
  for (const uint64_t i : order) {
    std::vector<dim3> positions;
    s.shared_bytes.assign(cluster, 0);
    for (int rank = 0; rank < cluster; ++rank) {
      const uint64_t at = i * cluster + rank;
      positions.emplace_back(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                             static_cast<unsigned>(at / grid.x / grid.y));
      if (smem > 0) s.allocate_shared(rank, nullptr, smem);
    }
    s.run_cluster(positions);
    s.free_shared();
    if (!s.error.empty())
      throw std::runtime_error(std::string(kernel) + ", block (" + std::to_string(positions[0].x) + ", " +
                               std::to_string(positions[0].y) + ", " + std::to_string(positions[0].z) +
                               "): " + s.error);
  }
}

}  // namespace emu
}  // namespace fastdiff

// The knobs, for a test that has loaded the library (ctypes).
#define FD_EXPORT extern "C" __attribute__((visibility("default")))

FD_EXPORT void emu_seed(uint64_t value) { fastdiff::emu::seed(value); }
FD_EXPORT void emu_lockstep(int on) { fastdiff::emu::set_lockstep(on != 0); }
FD_EXPORT void emu_grid_limit(int64_t blocks) { fastdiff::emu::grid_limit = blocks; }
FD_EXPORT void emu_multiprocessors(int count) { fastdiff::emu::multiprocessors = count; }
FD_EXPORT void emu_hopper(int on) { fastdiff::emu::hopper = on != 0; }
FD_EXPORT void emu_record(int on) { fastdiff::emu::record(on != 0); }
FD_EXPORT const char* emu_recorded() { return fastdiff::emu::recorded(); }
FD_EXPORT const char* emu_last_kernel() { return fastdiff::emu::last_kernel(); }
FD_EXPORT int64_t emu_switches() { return fastdiff::emu::switches(); }
FD_EXPORT void emu_mutate(int mutation) { fastdiff::emu::mutation = mutation; }
FD_EXPORT const char* emu_mutations() {  // their names, from number 1 on
#define FD_X(name) #name " "
  return FD_MUTATIONS(FD_X);
#undef FD_X
}
