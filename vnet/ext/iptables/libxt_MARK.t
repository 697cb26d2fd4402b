# One rule a line: what is given; what it is saved as ("=": the same); OK or FAIL.
# ":" names the chains that each rule is tried in, "*" their table.
*mangle
:INPUT,FORWARD,OUTPUT
-j MARK --set-xmark 0xfeedcafe/0xfeedcafe;=;OK
-j MARK --set-xmark 0x0;-j MARK --set-xmark 0x0/0xffffffff;OK
-j MARK --set-xmark 4294967295;-j MARK --set-xmark 0xffffffff/0xffffffff;OK
-j MARK --set-xmark 4294967296;;FAIL
-j MARK --set-xmark 18446744073709551615;;FAIL
-j MARK --set-xmark 18446744073709551616;;FAIL
-j MARK --set-xmark 99999999999999999999999999999999;;FAIL
-j MARK --set-xmark -1;;FAIL
-j MARK --set-xmark +1;-j MARK --set-xmark 0x1/0xffffffff;OK
-j MARK --set-xmark 010;-j MARK --set-xmark 0x8/0xffffffff;OK
-j MARK --set-xmark 08;;FAIL
-j MARK --set-xmark 0xABCDEF;-j MARK --set-xmark 0xabcdef/0xffffffff;OK
-j MARK --set-xmark 0xg;;FAIL
-j MARK --set-xmark 1x;;FAIL
-j MARK --set-xmark "";;FAIL
-j MARK --set-xmark 1/0xffff;-j MARK --set-xmark 0x1/0xffff;OK
-j MARK --set-xmark 0xab/0xcdef;=;OK
-j MARK --xor-mark 0xabcdef;-j MARK --set-xmark 0xabcdef/0x0;OK
-j MARK --set-xmark 0x1/0x0;=;OK
-j MARK --set-xmark 0x0/0x0;=;OK
-j MARK --set-xmark 1/4294967295;-j MARK --set-xmark 0x1/0xffffffff;OK
-j MARK --set-xmark 1/4294967296;;FAIL
-j MARK --set-xmark 1/-1;;FAIL
-j MARK --set-xmark 1/;;FAIL
-j MARK --set-xmark /1;;FAIL
-j MARK --set-xmark 1/2/3;;FAIL
-j MARK --set-xmark 1/x;;FAIL
-j MARK --set-mark 1;-j MARK --set-xmark 0x1/0xffffffff;OK
-j MARK --set-mark 0x10/0xf;-j MARK --set-xmark 0x10/0x1f;OK
-j MARK --set-mark 0xffffffff/0;-j MARK --set-xmark 0xffffffff/0xffffffff;OK
-j MARK --set-mark 0/0xff;-j MARK --set-xmark 0x0/0xff;OK
-j MARK --set-mark 4294967296;;FAIL
-j MARK --set-mark 1/4294967296;;FAIL
-j MARK --and-mark 0xffff;-j MARK --set-xmark 0x0/0xffff0000;OK
-j MARK --and-mark 0;-j MARK --set-xmark 0x0/0xffffffff;OK
-j MARK --and-mark 4294967295;-j MARK --set-xmark 0x0/0x0;OK
-j MARK --and-mark 4294967296;;FAIL
-j MARK --and-mark 1/1;;FAIL
-j MARK --or-mark 0xff00;-j MARK --set-xmark 0xff00/0xff00;OK
-j MARK --or-mark 0xffffffff;-j MARK --set-xmark 0xffffffff/0xffffffff;OK
-j MARK --or-mark 4294967296;;FAIL
-j MARK --or-mark -1;;FAIL
-j MARK --xor-mark 0x80000000;-j MARK --set-xmark 0x80000000/0x0;OK
-j MARK --xor-mark 4294967296;;FAIL
-j MARK --set-mark;;FAIL
-j MARK ! --set-mark 1;;FAIL
-j MARK --set-mark 1 --set-mark 2;;FAIL
-j MARK --set-mark 1 --set-xmark 2;;FAIL
-j MARK --set-mark 1 --and-mark 2;;FAIL
-j MARK --or-mark 1 --xor-mark 2;;FAIL
-j MARK;;FAIL
-p tcp -j MARK --set-mark 1/0xffff;-p tcp -j MARK --set-xmark 0x1/0xffff;OK
# --copy-xid: OK where the kernel has xt_copyxid
-j MARK --copy-xid=1;;FAIL
-j MARK --copy-xid 1;;FAIL
-j MARK ! --copy-xid;;FAIL
-j MARK --copy-xid --copy-xid;;FAIL
-j MARK --copy-xid --set-mark 1;;FAIL
-j MARK --set-mark 1 --copy-xid;;FAIL
-j MARK --set-xmark 1/1 --copy-xid;;FAIL
-j MARK --copy-xid --and-mark 1;;FAIL
-j MARK --copy-xid --or-mark 1;;FAIL
-j MARK --copy-xid --xor-mark 1;;FAIL
-p udp -j MARK --copy-xid;=;OK
:PREROUTING,INPUT,FORWARD,OUTPUT,POSTROUTING
-j MARK --copy-xid;=;OK
*raw
:PREROUTING,OUTPUT
-j MARK --copy-xid;=;OK
-j MARK --set-mark 1;-j MARK --set-xmark 0x1/0xffffffff;OK
*nat
:PREROUTING,INPUT,OUTPUT,POSTROUTING
-j MARK --copy-xid;=;OK
-j MARK --set-mark 1;-j MARK --set-xmark 0x1/0xffffffff;OK
*filter
:INPUT,FORWARD,OUTPUT
-j MARK --copy-xid;=;OK
-j MARK --set-mark 1;-j MARK --set-xmark 0x1/0xffffffff;OK
