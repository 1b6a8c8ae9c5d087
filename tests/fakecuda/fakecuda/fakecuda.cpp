// A CUDA runtime without a GPU: stands in for libcudart.so.13 (LD_PRELOAD, same SONAME).
//
// Device memory is host memory at a second address: "device" addresses [DEV, DEV+POOL) are reserved PROT_NONE, so
// host code that dereferences a device pointer crashes as it would with a real GPU; the bytes live at address+SHIFT.
// Kernels go to Python (fakecuda/engine.py, imported on the first launch), which runs ptxsim. All calls are synchronous.
// Runtime API entry points that are not here get a generated stub that returns cudaErrorNotSupported (build.py).
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {
constexpr uint64_t DEV = 0x200000000000ull, SHIFT = 0x010000000000ull, POOL = 64ull << 30, GRAIN = 512, GUARD = 512;
constexpr int MAXDEV = 8;
constexpr size_t QUARANTINE = 256 << 20;
constexpr uint64_t PAGE = 4096, POISON_TILE = 8 << 20, POISON_BY_MAPPING = 32 << 20;

struct Card {
  const char* name;
  int major, minor, sms, threads_sm, blocks_sm;
  size_t mem, smem_sm, smem_optin;
  int l2, bus, clk, mclk;
};
const Card CARDS[] = {{"NVIDIA H100 80GB HBM3", 9, 0, 132, 2048, 32, 80ull << 30, 233472, 232448, 50 << 20, 5120, 1980000, 2619000},
                      {"NVIDIA A100-SXM4-80GB", 8, 0, 108, 2048, 32, 80ull << 30, 167936, 166912, 40 << 20, 5120, 1410000, 1593000},
                      {"Tesla T4", 7, 5, 40, 1024, 16, 15ull << 30, 65536, 65536, 4 << 20, 256, 1590000, 5001000}};
const char* CARD_NAMES[] = {"H100", "A100", "T4"};

typedef std::map<uint64_t, uint64_t> Clock;  // stream id -> operations of it that are known to be over (vector clock)
struct Mark {
  uint64_t tick;
  std::string what;
};
struct Alloc {
  uint64_t size, id;
  int device;
  bool live;
  std::map<uint64_t, Mark> reads, write;  // last read per stream since the last write, last write
};
struct Func {
  const char* name;
  const void* host;
  void* fatbin;
  const char* lib;
  int dyn_smem[MAXDEV];
  int carveout;
};
struct Var {
  const char* name;
  void* fatbin;
  size_t size;
};
struct Stream {
  int device, priority;
  unsigned flags;
  uint64_t id;
};
struct Event {
  bool recorded;
  std::chrono::steady_clock::time_point t;
  unsigned flags;
  Clock clock;
};

std::recursive_mutex& mu() {
  static auto* m = new std::recursive_mutex;
  return *m;
}
#define LOCK std::lock_guard<std::recursive_mutex> lock_(mu())

struct State {
  const Card* card = CARDS;
  int ndev = 1;
  bool pool = false;
  std::map<uint64_t, Alloc> blocks;  // live and quarantined, by address
  std::deque<uint64_t> freed;
  uint64_t freed_bytes = 0, next_id = 1, used[MAXDEV] = {}, peak[MAXDEV] = {};
  std::map<uint64_t, uint64_t> pinned;
  std::unordered_map<const void*, Func*> funcs;
  std::unordered_map<const void*, Var> vars;
  std::set<void*> streams, events;
  std::map<std::string, uint64_t> calls, bytes;
  std::vector<std::string> issues;
  bool primary[MAXDEV] = {};
  std::map<uint64_t, Clock> clocks;
  Clock host;
  uint64_t next_stream = 100;
  State() {
    if (const char* c = getenv("FAKECUDA_CARD"))
      for (int i = 0; i < 3; i++)
        if (!strcasecmp(c, CARD_NAMES[i])) card = &CARDS[i];
    if (const char* n = getenv("FAKECUDA_DEVICES")) ndev = std::min(std::max(atoi(n), 0), MAXDEV);
  }
};
State& S() {
  static State* s = new State;
  return *s;
}  // never destroyed: other libraries unregister at exit

thread_local cudaError_t g_last = cudaSuccess;
thread_local int g_dev = 0;
struct Config {
  dim3 g, b;
  size_t sh;
  cudaStream_t s;
};
thread_local std::vector<Config> g_cfg;

cudaError_t E(cudaError_t e) {
  if (e != cudaSuccess) g_last = e;
  return e;
}
void count(const char* f) {
  LOCK;
  S().calls[f]++;
}
#define API count(__func__)
#define TRY(x)                           \
  do {                                   \
    cudaError_t e_ = (x);                \
    if (e_ != cudaSuccess) return E(e_); \
  } while (0)

void issue(const char* fmt, ...) {
  char b[512];
  va_list a;
  va_start(a, fmt);
  vsnprintf(b, sizeof b, fmt, a);
  va_end(a);
  LOCK;
  S().issues.push_back(b);
}

bool is_dev(uint64_t a) { return a >= DEV && a < DEV + POOL; }
uint64_t up(uint64_t x, uint64_t a) { return (x + a - 1) / a * a; }

bool init_pool() {
  LOCK;
  if (S().pool) return true;
  int fl = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
  void* a = mmap((void*)DEV, POOL, PROT_NONE, fl, -1, 0);
  void* b = mmap((void*)(DEV + SHIFT), POOL, PROT_READ | PROT_WRITE, fl, -1, 0);
  return S().pool = (a == (void*)DEV && b == (void*)(DEV + SHIFT));
}

Alloc* find(uint64_t a, uint64_t* start = nullptr) {
  auto it = S().blocks.upper_bound(a);
  if (it == S().blocks.begin()) return nullptr;
  --it;
  if (start) *start = it->first;
  return a < it->first + std::max<uint64_t>(it->second.size, 1) ? &it->second : nullptr;
}

// A file of POISON_TILE bytes of 0xFF, or -1.
int poison_file() {
  static int fd = [] {
    int f = memfd_create("fakecuda-poison", MFD_CLOEXEC);
    if (f < 0 || ftruncate(f, POISON_TILE)) return -1;
    void* m = mmap(nullptr, POISON_TILE, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
    if (m == MAP_FAILED) return -1;
    memset(m, 0xFF, POISON_TILE);
    munmap(m, POISON_TILE);
    return f;
  }();
  return fd;
}

// Fill n bytes at device address a with 0xFF (NaN, -1), so that uninitialised reads show. The pages of a large range are mapped
// to the poison file instead of written: they take memory only where somebody writes, and give back what they had.
void poison(uint64_t a, uint64_t n) {
  uint64_t at = a + SHIFT, end = at + n;
  if (n >= POISON_BY_MAPPING && poison_file() >= 0) {
    uint64_t first = up(at, PAGE), last = end / PAGE * PAGE, next = first;
    while (next < last) {
      uint64_t k = std::min(last - next, POISON_TILE);
      if (mmap((void*)next, k, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, poison_file(), 0) == MAP_FAILED) break;
      next += k;
    }
    memset((void*)at, 0xFF, first - at);
    at = next;
  }
  memset((void*)at, 0xFF, end - at);
}

cudaError_t dev_alloc(void** p, size_t n) {
  *p = nullptr;
  if (n == 0) return cudaSuccess;
  if (!init_pool()) return cudaErrorMemoryAllocation;
  LOCK;
  State& s = S();
  if (s.used[g_dev] + n > s.card->mem) return cudaErrorMemoryAllocation;
  uint64_t at = DEV + GUARD;  // first fit: keeps the span that ptxsim maps short
  for (auto& [a, b] : s.blocks) {
    if (at + up(n, GRAIN) + GUARD <= a) break;
    at = a + up(b.size, GRAIN) + GUARD;
  }
  if (at + up(n, GRAIN) + GUARD > DEV + POOL) return cudaErrorMemoryAllocation;
  s.blocks[at] = {n, s.next_id++, g_dev, true, {}, {}};
  s.used[g_dev] += n;
  s.peak[g_dev] = std::max(s.peak[g_dev], s.used[g_dev]);
  poison(at, up(n, GRAIN));
  *p = (void*)at;
  return cudaSuccess;
}

cudaError_t dev_free(void* p) {
  if (!p) return cudaSuccess;
  LOCK;
  State& s = S();
  auto it = s.blocks.find((uint64_t)p);
  if (it == s.blocks.end() || !it->second.live) {
    issue("cudaFree of %p, which is not a live allocation", p);
    return cudaErrorInvalidValue;
  }
  it->second.live = false;
  s.used[it->second.device] -= it->second.size;
  poison(it->first, it->second.size);
  s.freed.push_back(it->first);
  s.freed_bytes += it->second.size;
  uint64_t keep = 1024;
  while (s.freed_bytes > QUARANTINE || s.freed.size() > keep) {
    auto old = s.blocks.find(s.freed.front());
    s.freed_bytes -= old->second.size;
    s.blocks.erase(old);
    s.freed.pop_front();
  }
  return cudaSuccess;
}

// ---- order of streams: who may touch what. Stream 1+d is device d's default stream.
bool plain(cudaStream_t s) { return s == nullptr || s == (cudaStream_t)1 || s == (cudaStream_t)2; }
uint64_t sid(cudaStream_t s) { return plain(s) ? 1 + g_dev : ((Stream*)s)->id; }
void join(Clock& a, const Clock& b) {
  for (auto& [k, v] : b)
    if (a[k] < v) a[k] = v;
}
uint64_t begin(cudaStream_t s) {  // a new operation on s
  LOCK;
  uint64_t id = sid(s);
  Clock& c = S().clocks[id];
  join(c, S().host);
  for (void* p : S().streams) {  // blocking streams and the legacy default stream wait for each other
    auto* x = (Stream*)p;
    if (x->flags & cudaStreamNonBlocking || x->device != g_dev) continue;
    if (plain(s))
      join(c, S().clocks[x->id]);
    else if (x == (Stream*)s)
      join(c, S().clocks[1 + g_dev]);
  }
  c[id]++;
  return id;
}
void synced(uint64_t id) {
  LOCK;
  join(S().host, S().clocks[id]);
}
void access(uint64_t a, uint64_t id, bool write, const char* what) {
  if (!is_dev(a)) return;
  LOCK;
  Alloc* b = find(a);
  if (!b) return;
  Clock& c = S().clocks[id];
  auto check = [&](std::map<uint64_t, Mark>& m, const char* verb) {
    for (auto& [s, k] : m)
      if (s != id && c[s] < k.tick)
        issue("stream-race|%s (stream %d) %s buffer #%d, which %s (stream %d) %s: nothing orders the two", what, (int)id,
              write ? "writes" : "reads", (int)b->id, k.what.c_str(), (int)s, verb);
  };
  check(b->write, "wrote");
  if (write) {
    check(b->reads, "read");
    b->reads.clear();
    b->write.clear();
    b->write[id] = {c[id], what};
  } else
    b->reads[id] = {c[id], what};
}

// Device range -> host bytes, checked against the exact allocation; host pointers pass.
cudaError_t host_of(const void* p, size_t n, const char* what, void** out) {
  uint64_t a = (uint64_t)p;
  *out = (void*)p;
  if (!is_dev(a)) return cudaSuccess;
  LOCK;
  uint64_t st;
  Alloc* b = find(a, &st);
  if (n && (!b || !b->live || a + n > st + b->size)) {
    issue("%s of %zu bytes at %p: outside of any live allocation", what, n, p);
    return cudaErrorInvalidValue;
  }
  *out = (void*)(a + SHIFT);
  return cudaSuccess;
}

cudaError_t copy(void* d, const void* s, size_t n, const char* what, cudaStream_t st = nullptr, bool async = false) {
  void *hd, *hs;
  TRY(host_of(d, n, what, &hd));
  TRY(host_of(s, n, what, &hs));
  if (n) memmove(hd, hs, n);
  uint64_t id = begin(st);
  access((uint64_t)s, id, false, what);
  access((uint64_t)d, id, true, what);
  if (!async) synced(id);
  const char* k = is_dev((uint64_t)d) ? (is_dev((uint64_t)s) ? "DtoD" : "HtoD") : (is_dev((uint64_t)s) ? "DtoH" : "HtoH");
  LOCK;
  S().bytes[k] += n;
  return cudaSuccess;
}

cudaError_t fill(void* d, int v, size_t n, cudaStream_t st) {
  void* h;
  TRY(host_of(d, n, "memset", &h));
  if (n) memset(h, v, n);
  if (n) access((uint64_t)d, begin(st), true, "memset");
  LOCK;
  S().bytes["memset"] += n;
  return cudaSuccess;
}

cudaError_t ok_stream(cudaStream_t s) {
  if (plain(s)) return cudaSuccess;
  LOCK;
  return S().streams.count(s) ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

// ---- the Python side: fakecuda.engine sets these
struct Launch {
  Func* f;
  unsigned g[3], b[3];
  size_t smem;
  void* stream;
  int device;
  int coop;
  void** args;
};
struct Attr {
  uint64_t shared, local, konst;
  int max_threads, regs, ptx, bin;
};
int (*py_launch)(Launch*) = nullptr;
int (*py_attr)(Func*, Attr*) = nullptr;
uint64_t (*py_symbol)(void* fatbin, const char* name, int device) = nullptr;

bool engine() {
  if (py_launch) return true;
  auto ens = (int (*)())dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
  auto rel = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
  auto run = (int (*)(const char*, void*))dlsym(RTLD_DEFAULT, "PyRun_SimpleStringFlags");
  auto isup = (int (*)())dlsym(RTLD_DEFAULT, "Py_IsInitialized");
  if (!ens || !rel || !run || !isup || !isup()) return false;
  int g = ens();
  run("import fakecuda.engine", nullptr);
  rel(g);
  return py_launch != nullptr;
}

Func* func_of(const void* f) {
  LOCK;
  auto it = S().funcs.find(f);
  if (it != S().funcs.end()) return it->second;
  for (auto& kv : S().funcs)
    if (kv.second == f) return kv.second;  // a cudaKernel_t
  return nullptr;
}

cudaError_t launch(const void* fn, dim3 g, dim3 b, void** args, size_t sh, cudaStream_t st, int coop) {
  Func* f = func_of(fn);
  if (!f) return E(cudaErrorInvalidDeviceFunction);
  TRY(ok_stream(st));
  if (!plain(st) && ((Stream*)st)->device != g_dev) {
    issue("kernel %s launched on a stream of device %d while device %d is current", f->name, ((Stream*)st)->device, g_dev);
    return E(cudaErrorInvalidResourceHandle);
  }
  if (!engine()) {
    fprintf(stderr, "fakecuda: no Python to run kernel %s\n", f->name);
    return E(cudaErrorLaunchFailure);
  }
  Launch l{f, {g.x, g.y, g.z}, {b.x, b.y, b.z}, sh, st, g_dev, coop, args};
  return E((cudaError_t)py_launch(&l));
}

uint64_t symbol(const void* s) {
  Var v;
  {
    LOCK;
    auto it = S().vars.find(s);
    if (it == S().vars.end()) return 0;
    v = it->second;
  }
  return engine() ? py_symbol(v.fatbin, v.name, g_dev) : 0;
}
}  // namespace

extern "C" {
// ------------------------------------------------------------ control (used by the Python package)
void fc_hooks(void* l, void* a, void* s) {
  py_attr = (decltype(py_attr))a;
  py_symbol = (decltype(py_symbol))s;
  py_launch = (decltype(py_launch))l;
}
uint64_t fc_dev_base() { return DEV; }
uint64_t fc_shift() { return SHIFT; }
struct FcAlloc {
  uint64_t addr, size, id;
  int device, live;
};
uint64_t fc_allocs(FcAlloc* out, uint64_t max) {
  LOCK;
  uint64_t n = 0;
  for (auto& [a, b] : S().blocks) {
    if (n < max) out[n] = {a, b.size, b.id, b.device, b.live};
    n++;
  }
  return n;
}
uint64_t fc_text(int what, char* out, uint64_t max) {  // 0: issues (taken), 1: call counts, 2: bytes
  LOCK;
  std::string t;
  if (what == 0) {
    for (auto& s : S().issues) t += s + "\n";
  } else
    for (auto& [k, v] : what == 1 ? S().calls : S().bytes) t += k + "\t" + std::to_string(v) + "\n";
  if (t.size() < max) {
    memcpy(out, t.c_str(), t.size() + 1);
    if (what == 0) S().issues.clear();
  }
  return t.size();
}
uint64_t fc_op(cudaStream_t s, int device) {
  int o = g_dev;
  g_dev = device;
  uint64_t id = begin(s);
  g_dev = o;
  return id;
}
void fc_access(uint64_t a, uint64_t id, int write, const char* what) { access(a, id, write, what); }
void fc_synced(uint64_t id) { synced(id); }
int fc_devices() { return S().ndev; }
uint64_t fc_peak(int d) {
  LOCK;
  return S().peak[d];
}
uint64_t fc_funcs(Func** out, uint64_t max) {
  LOCK;
  uint64_t n = 0;
  for (auto& kv : S().funcs) {
    if (n < max) out[n] = kv.second;
    n++;
  }
  return n;
}
int fc_dyn_smem(Func* f, int d) { return f->dyn_smem[d]; }
int fc_unimplemented(const char* name) {
  LOCK;
  S().calls[std::string("unsupported:") + name]++;
  g_last = cudaErrorNotSupported;
  return cudaErrorNotSupported;
}
int fc_absent(const char* name) {  // a function of cuBLAS, cuDNN... in lean mode
  LOCK;
  if (!S().calls["absent:" + std::string(name)]++)
    fprintf(stderr, "fakecuda: %s called, but the NVIDIA library is not installed (lean mode)\n", name);
  return 1;
}
int fc_alloc_on(int device, size_t n, void** p) {
  int o = g_dev;
  g_dev = device;
  int e = dev_alloc(p, n);
  g_dev = o;
  return e;
}
void fc_card(int* out) {
  const Card& c = *S().card;
  int v[] = {c.major, c.minor, c.sms, c.threads_sm, c.blocks_sm, (int)c.smem_sm, (int)c.smem_optin};
  memcpy(out, v, sizeof v);
}

// ------------------------------------------------------------ registration and launch
struct Wrapper {
  int magic, version;
  void* data;
  void* filename;
};
void** __cudaRegisterFatBinary(void* w) {
  Dl_info d;
  auto** h = new void*[2]{((Wrapper*)w)->data, dladdr(w, &d) && d.dli_fname ? (void*)strdup(d.dli_fname) : (void*)""};
  return h;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** h, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  LOCK;
  S().funcs[host] = new Func{name, host, h[0], (const char*)h[1], {}, -1};
}
void __cudaRegisterVar(void** h, char* host, char*, const char* name, int, size_t size, int, int) {
  LOCK;
  S().vars[host] = {name, h[0], size};
}
void __cudaRegisterManagedVar(void**, void**, char*, const char* name, int, size_t, int, int) {
  issue("__managed__ variable %s is not supported", name);
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t sh, cudaStream_t s) {
  g_cfg.push_back({g, b, sh, s});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* sh, void* s) {
  if (g_cfg.empty()) return E(cudaErrorMissingConfiguration);
  Config& c = g_cfg.back();
  *g = c.g;
  *b = c.b;
  *sh = c.sh;
  *(cudaStream_t*)s = c.s;
  g_cfg.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
  LOCK;
  auto it = S().funcs.find(f);
  if (it == S().funcs.end()) return E(cudaErrorInvalidDeviceFunction);
  *k = (cudaKernel_t)it->second;
  return cudaSuccess;
}
cudaError_t cudaGetFuncBySymbol(cudaFunction_t* f, const void* s) { return __cudaGetKernel((cudaKernel_t*)f, s); }
cudaError_t cudaGetKernel(cudaKernel_t* k, const void* f) { return __cudaGetKernel(k, f); }
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** a, size_t sh, cudaStream_t s) {
  API;
  return launch((const void*)k, g, b, a, sh, s, 0);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t sh, cudaStream_t s) {
  API;
  return launch(f, g, b, a, sh, s, 0);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** a, size_t sh, cudaStream_t s) {
  API;
  return launch(f, g, b, a, sh, s, 1);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) {
  API;
  int coop = 0;
  for (unsigned i = 0; i < c->numAttrs; i++) {
    if (c->attrs[i].id == cudaLaunchAttributeCooperative) coop = c->attrs[i].val.cooperative;
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      issue("cluster launches are not supported");
      return E(cudaErrorNotSupported);
    }
  }
  return launch(f, c->gridDim, c->blockDim, a, c->dynamicSmemBytes, c->stream, coop);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t fn, void* u) {
  API;
  TRY(ok_stream(s));
  fn(u);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t cb, void* u, unsigned) {
  API;
  TRY(ok_stream(s));
  cb(s, cudaSuccess, u);
  return cudaSuccess;
}

// ------------------------------------------------------------ errors, versions
cudaError_t cudaGetLastError() {
  cudaError_t e = g_last;
  g_last = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return g_last; }
struct Err {
  int code;
  const char *name, *text;
};
static const Err ERRS[] = {{0, "cudaSuccess", "no error"},
                           {1, "cudaErrorInvalidValue", "invalid argument"},
                           {2, "cudaErrorMemoryAllocation", "out of memory"},
                           {9, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
                           {13, "cudaErrorInvalidSymbol", "invalid device symbol"},
                           {52, "cudaErrorMissingConfiguration", "__global__ function call is not configured"},
                           {98, "cudaErrorInvalidDeviceFunction", "invalid device function"},
                           {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
                           {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
                           {209, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
                           {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
                           {600, "cudaErrorNotReady", "device not ready"},
                           {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
                           {701, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
                           {702, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
                           {704, "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled"},
                           {710, "cudaErrorAssert", "device-side assert triggered"},
                           {716, "cudaErrorMisalignedAddress", "misaligned address"},
                           {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
                           {801, "cudaErrorNotSupported", "operation not supported (by fakecuda)"}};
const char* cudaGetErrorName(cudaError_t e) {
  for (auto& x : ERRS)
    if (x.code == e) return x.name;
  return "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t e) {
  for (auto& x : ERRS)
    if (x.code == e) return x.text;
  return "unknown error";
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}

// ------------------------------------------------------------ devices
cudaError_t cudaGetDeviceCount(int* n) {
  API;
  *n = S().ndev;
  return S().ndev ? cudaSuccess : E(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* d) {
  *d = g_dev;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
  API;
  if (d < 0 || d >= S().ndev) return E(cudaErrorInvalidDevice);
  g_dev = d;
  S().primary[d] = true;
  return cudaSuccess;
}
cudaError_t cudaInitDevice(int d, unsigned, unsigned) { return d < 0 || d >= S().ndev ? E(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  API;
  LOCK;
  for (auto& kv : S().clocks) join(S().host, kv.second);
  return cudaSuccess;
}
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  API;
  if (d < 0 || d >= S().ndev) return E(cudaErrorInvalidDevice);
  const Card& c = *S().card;
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s (fakecuda)", c.name);
  memcpy(p->uuid.bytes, "fakecuda-device", 15);
  p->uuid.bytes[15] = (char)('0' + d);
  p->totalGlobalMem = c.mem;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = c.major;
  p->minor = c.minor;
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->multiProcessorCount = c.sms;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = 1;
  p->ECCEnabled = 1;
  p->pciBusID = 0x10 + d;
  p->asyncEngineCount = 3;
  p->memoryBusWidth = c.bus;
  p->l2CacheSize = c.l2;
  p->maxThreadsPerMultiProcessor = c.threads_sm;
  p->globalL1CacheSupported = p->localL1CacheSupported = 1;
  p->sharedMemPerMultiprocessor = c.smem_sm;
  p->regsPerMultiprocessor = 65536;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = c.smem_optin;
  p->maxBlocksPerMultiProcessor = c.blocks_sm;
  p->reservedSharedMemPerBlock = c.major >= 8 ? 1024 : 0;
  p->accessPolicyMaxWindowSize = 128 << 20;
  p->computePreemptionSupported = 1;
  p->clusterLaunch = c.major >= 9;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int d) {
  API;
  cudaDeviceProp p;
  cudaError_t e = cudaGetDeviceProperties(&p, d);
  if (e) return e;
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *v = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = p.maxGridSize[0];
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = (int)p.sharedMemPerBlock;
      break;
    case cudaDevAttrTotalConstantMemory:
      *v = 65536;
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *v = 65536;
      break;
    case cudaDevAttrClockRate:
      *v = S().card->clk;
      break;
    case cudaDevAttrMemoryClockRate:
      *v = S().card->mclk;
      break;
    case cudaDevAttrMultiProcessorCount:
      *v = p.multiProcessorCount;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *v = p.memoryBusWidth;
      break;
    case cudaDevAttrL2CacheSize:
      *v = p.l2CacheSize;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = p.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *v = p.maxBlocksPerMultiProcessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *v = (int)p.sharedMemPerMultiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = (int)p.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *v = (int)p.reservedSharedMemPerBlock;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = p.minor;
      break;
    case cudaDevAttrTextureAlignment:
      *v = 512;
      break;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrEccEnabled:
      *v = 1;
      break;
    case cudaDevAttrAsyncEngineCount:
      *v = 3;
      break;
    case cudaDevAttrPciBusId:
      *v = p.pciBusID;
      break;
    default:
      *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) {
  snprintf(s, n, "0000:%02x:00.0", 0x10 + d);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* lo, int* hi) {
  *lo = 0;
  *hi = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetLimit(size_t* v, cudaLimit) {
  *v = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) {
  *v = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ------------------------------------------------------------ memory
cudaError_t cudaMalloc(void** p, size_t n) {
  API;
  return E(dev_alloc(p, n));
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t s) {
  API;
  TRY(ok_stream(s));
  return E(dev_alloc(p, n));
}
cudaError_t cudaFree(void* p) {
  API;
  return E(dev_free(p));
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t s) {
  API;
  TRY(ok_stream(s));
  return E(dev_free(p));
}
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  LOCK;
  *t = S().card->mem;
  *f = *t - S().used[g_dev];
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  API;
  *p = aligned_alloc(4096, up(n ? n : 1, 4096));
  if (!*p) return E(cudaErrorMemoryAllocation);
  LOCK;
  S().pinned[(uint64_t)*p] = n;
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
cudaError_t cudaFreeHost(void* p) {
  API;
  LOCK;
  if (p && !S().pinned.erase((uint64_t)p)) return E(cudaErrorInvalidValue);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  API;
  LOCK;
  S().pinned[(uint64_t)p] = n;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  API;
  LOCK;
  S().pinned.erase((uint64_t)p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
  API;
  return copy(d, s, n, "cudaMemcpy");
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t st) {
  API;
  TRY(ok_stream(st));
  return copy(d, s, n, "cudaMemcpyAsync", st, true);
}
cudaError_t cudaMemcpyPeer(void* d, int, const void* s, int, size_t n) {
  API;
  return copy(d, s, n, "cudaMemcpyPeer");
}
cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t st) {
  API;
  TRY(ok_stream(st));
  return copy(d, s, n, "cudaMemcpyPeerAsync", st, true);
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind, cudaStream_t st) {
  API;
  TRY(ok_stream(st));
  for (size_t i = 0; i < h; i++) TRY(copy((char*)d + i * dp, (const char*)s + i * sp, w, "cudaMemcpy2DAsync", st, true));
  return cudaSuccess;
}
cudaError_t cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind k) {
  return cudaMemcpy2DAsync(d, dp, s, sp, w, h, k, nullptr);
}
cudaError_t cudaMemset(void* d, int v, size_t n) {
  API;
  return fill(d, v, n, nullptr);
}
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t s) {
  API;
  TRY(ok_stream(s));
  return fill(d, v, n, s);
}
cudaError_t cudaGetSymbolAddress(void** p, const void* s) {
  API;
  *p = (void*)symbol(s);
  return *p ? cudaSuccess : E(cudaErrorInvalidSymbol);
}
cudaError_t cudaGetSymbolSize(size_t* n, const void* s) {
  LOCK;
  auto it = S().vars.find(s);
  if (it == S().vars.end()) return E(cudaErrorInvalidSymbol);
  *n = it->second.size;
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void* s, const void* src, size_t n, size_t off, cudaMemcpyKind) {
  API;
  uint64_t a = symbol(s);
  return a ? copy((char*)a + off, src, n, "cudaMemcpyToSymbol") : E(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* s, const void* src, size_t n, size_t off, cudaMemcpyKind k, cudaStream_t) {
  return cudaMemcpyToSymbol(s, src, n, off, k);
}
cudaError_t cudaMemcpyFromSymbol(void* d, const void* s, size_t n, size_t off, cudaMemcpyKind) {
  API;
  uint64_t a = symbol(s);
  return a ? copy(d, (char*)a + off, n, "cudaMemcpyFromSymbol") : E(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* d, const void* s, size_t n, size_t off, cudaMemcpyKind k, cudaStream_t) {
  return cudaMemcpyFromSymbol(d, s, n, off, k);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  API;
  memset(a, 0, sizeof *a);
  LOCK;
  uint64_t x = (uint64_t)p;
  if (is_dev(x)) {
    Alloc* b = find(x);
    if (b && b->live) {
      a->type = cudaMemoryTypeDevice;
      a->device = b->device;
      a->devicePointer = (void*)p;
      return cudaSuccess;
    }
  }
  auto it = S().pinned.upper_bound(x);
  if (it != S().pinned.begin() && x < (--it)->first + it->second) {
    a->type = cudaMemoryTypeHost;
    a->device = g_dev;
    a->hostPointer = (void*)p;
    a->devicePointer = (void*)p;
    return cudaSuccess;
  }
  a->type = cudaMemoryTypeUnregistered;
  a->device = -2;
  a->hostPointer = (void*)p;
  return cudaSuccess;
}

// ------------------------------------------------------------ streams and events (everything is synchronous)
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int p) {
  API;
  LOCK;
  auto* x = new Stream{g_dev, p, f, S().next_stream++};
  S().streams.insert(x);
  *s = (cudaStream_t)x;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) { return cudaStreamCreateWithPriority(s, f, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) {
  API;
  TRY(ok_stream(s));
  LOCK;
  S().streams.erase(s);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  API;
  TRY(ok_stream(s));
  synced(sid(s));
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
  API;
  TRY(ok_stream(s));
  synced(sid(s));
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  API;
  TRY(ok_stream(s));
  LOCK;
  join(S().clocks[sid(s)], ((Event*)e)->clock);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* st) {
  *st = cudaStreamCaptureStatusNone;
  return E(ok_stream(s));
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* st, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *st = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) {
  TRY(ok_stream(s));
  *p = plain(s) ? 0 : ((Stream*)s)->priority;
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t s, unsigned* f) {
  TRY(ok_stream(s));
  *f = plain(s) ? 0 : ((Stream*)s)->flags;
  return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t s, int* d) {
  TRY(ok_stream(s));
  *d = plain(s) ? g_dev : ((Stream*)s)->device;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) {
  API;
  LOCK;
  auto* x = new Event{false, {}, f, {}};
  S().events.insert(x);
  *e = (cudaEvent_t)x;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  LOCK;
  if (!S().events.erase(e)) return E(cudaErrorInvalidResourceHandle);
  delete (Event*)e;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
  API;
  TRY(ok_stream(s));
  LOCK;
  ((Event*)e)->recorded = true;
  ((Event*)e)->clock = S().clocks[sid(s)];
  join(((Event*)e)->clock, S().host);
  ((Event*)e)->t = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
cudaError_t cudaEventQuery(cudaEvent_t e) {
  LOCK;
  join(S().host, ((Event*)e)->clock);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  API;
  LOCK;
  join(S().host, ((Event*)e)->clock);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  auto *x = (Event*)a, *y = (Event*)b;
  if (!x->recorded || !y->recorded) return E(cudaErrorInvalidResourceHandle);
  *ms = std::chrono::duration<float, std::milli>(y->t - x->t).count();
  return cudaSuccess;
}

// ------------------------------------------------------------ function attributes, occupancy
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* fn) {
  API;
  Func* f = func_of(fn);
  Attr x{};
  if (!f) return E(cudaErrorInvalidDeviceFunction);
  if (!engine()) return E(cudaErrorNotSupported);
  TRY((cudaError_t)py_attr(f, &x));
  memset(a, 0, sizeof *a);
  a->sharedSizeBytes = x.shared;
  a->localSizeBytes = x.local;
  a->constSizeBytes = x.konst;
  a->maxThreadsPerBlock = x.max_threads;
  a->numRegs = x.regs;
  a->ptxVersion = x.ptx;
  a->binaryVersion = x.bin;
  a->maxDynamicSharedSizeBytes = std::max(f->dyn_smem[g_dev], (int)(49152 - x.shared));
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* fn, cudaFuncAttribute a, int v) {
  API;
  Func* f = func_of(fn);
  if (!f) return E(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    Attr x{};
    if (engine()) py_attr(f, &x);
    if (v < 0 || v + (int)x.shared > (int)S().card->smem_optin) return E(cudaErrorInvalidValue);
    f->dyn_smem[g_dev] = v;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* fn, int threads, size_t dyn, unsigned) {
  API;
  Func* f = func_of(fn);
  Attr x{};
  if (!f || !engine()) return E(cudaErrorInvalidDeviceFunction);
  TRY((cudaError_t)py_attr(f, &x));
  const Card& c = *S().card;
  if (threads < 1 || threads > x.max_threads) {
    *n = 0;
    return threads < 1 ? E(cudaErrorInvalidValue) : cudaSuccess;
  }
  int warps = (threads + 31) / 32, regs = std::max(x.regs, 16), perwarp = (regs * 32 + 255) / 256 * 256;
  int b = std::min(c.blocks_sm, c.threads_sm / (warps * 32));
  b = std::min(b, 65536 / (perwarp * warps));
  size_t sh = x.shared + dyn;
  if (sh || c.major >= 8) b = std::min<int>(b, (int)(c.smem_sm / up(sh + (c.major >= 8 ? 1024 : 0), c.major >= 8 ? 128 : 256)));
  *n = b;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* fn, int t, size_t d) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, fn, t, d, 0);
}

// ------------------------------------------------------------ the little of the driver API that torch reaches
#define NODRV 801
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* v) {
  *v = CUDART_VERSION;
  return 0;
}
int cuDeviceGetCount(int* n) {
  *n = S().ndev;
  return 0;
}
int cuDeviceGet(int* d, int o) {
  *d = o;
  return o >= 0 && o < S().ndev ? 0 : 101;
}
int cuDeviceGetAttribute(int* v, int a, int d) { return cudaDeviceGetAttribute(v, (cudaDeviceAttr)a, d); }
int cuDevicePrimaryCtxGetState(int d, unsigned* f, int* active) {
  if (f) *f = 0;
  *active = d < MAXDEV && S().primary[d];
  return 0;
}
int cuDevicePrimaryCtxRetain(void** c, int d) {
  *c = (void*)(uintptr_t)(0x1000 + d);
  return 0;
}
int cuCtxGetCurrent(void** c) {
  *c = (void*)(uintptr_t)(0x1000 + g_dev);
  return 0;
}
int cuCtxSetCurrent(void* c) {
  uint64_t d = (uint64_t)c - 0x1000;
  if (d < MAXDEV) g_dev = (int)d;
  return 0;
}
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuGetErrorString(int e, const char** s) {
  *s = cudaGetErrorString((cudaError_t)e);
  return 0;
}
int cuLogsRegisterCallback(void*, void*, void**) { return NODRV; }  // torch asks once, and does without
int cuLogsUnregisterCallback(void*) { return NODRV; }
int cuPointerGetAttribute(void*, int, uint64_t) { return NODRV; }
int cuMemGetAddressRange_v2(uint64_t* base, size_t* n, uint64_t p) {
  LOCK;
  uint64_t st;
  Alloc* b = find(p, &st);
  if (!b) return 1;
  if (base) *base = st;
  if (n) *n = b->size;
  return 0;
}
int no_driver(const char* what) {  // no last error: the driver API has none
  LOCK;
  S().calls[std::string("unsupported:") + what]++;
  return NODRV;
}
int cuFuncGetAttribute() { return no_driver(__func__); }
int cuFuncSetAttribute() { return no_driver(__func__); }
int cuFuncSetCacheConfig() { return no_driver(__func__); }
int cuLaunchCooperativeKernel() { return no_driver(__func__); }
int cuLaunchKernel() { return no_driver(__func__); }
int cuLinkAddData_v2() { return no_driver(__func__); }
int cuLinkComplete() { return no_driver(__func__); }
int cuLinkCreate_v2() { return no_driver(__func__); }
int cuModuleGetFunction() { return no_driver(__func__); }
int cuModuleLoad() { return no_driver(__func__); }
int cuModuleLoadData() { return no_driver(__func__); }
int cuModuleLoadDataEx() { return no_driver(__func__); }
int cuModuleUnload() { return no_driver(__func__); }
int cuOccupancyMaxActiveBlocksPerMultiprocessor() { return no_driver(__func__); }
int cuTensorMapEncodeTiled() { return no_driver(__func__); }
int fc_driver_unsupported() { return no_driver("driver"); }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** fn, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* r) {
  API;
  *fn = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (!*fn) *fn = dlsym(RTLD_DEFAULT, name);
  if (!*fn && getenv("FAKECUDA_DEBUG")) fprintf(stderr, "fakecuda: driver function %s asked for, not there\n", name);
  if (!*fn) *fn = (void*)fc_driver_unsupported;
  if (r) *r = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
