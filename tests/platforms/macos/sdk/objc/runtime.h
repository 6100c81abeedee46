// Stand-in for the Objective-C runtime header: only what metal-cpp names.
// Used to cross-compile where Apple's SDK is not at hand; a Mac build never sees it.
#pragma once

#include <stdbool.h>

typedef struct objc_class* Class;
typedef struct objc_object {
  Class isa;
}* id;
typedef struct objc_selector* SEL;
typedef struct objc_object Protocol;
typedef bool BOOL;

#ifdef __cplusplus
extern "C" {
#endif

Class objc_lookUpClass(const char* name);
Protocol* objc_getProtocol(const char* name);
SEL sel_registerName(const char* name);

#ifdef __cplusplus
}
#endif
