/* Work space for the C kernels that ends where memory begins which nobody may touch: what is written
   or read behind it ends the process. Filled with NaN, so that what is read before it is written
   shows. With `allocations` of 0 or more, the allocation after so many others fails. Included before a
   source (cc -include). */

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

__attribute__((weak)) int allocations = -1;

static inline void *guarded(size_t size, int filling) {
  if (allocations >= 0 && allocations-- == 0) return NULL;
  size_t page = 4096, pages = (size + page - 1) / page * page;
  char *at = mmap(NULL, pages + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED || mprotect(at + page, pages, PROT_READ | PROT_WRITE)) abort();
  memset(at + page, filling, pages);
  return at + page + pages - size;
}

#define allocate(size) guarded(size, 255)
#define calloc(number, size) guarded((number) * (size), 0)
#define free(pointer) ((void)(pointer)) /* a few pages, for a short process */
